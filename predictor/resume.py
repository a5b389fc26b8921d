"""Which checkpoint a user means to resume from, and whether it can be."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from lightning import Trainer


def checkpoint_to_resume(trainer: Trainer, wanted: str | None) -> Path | None:
    """The checkpoint file that a user means by a path or by "last"; None for a fresh start.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    if wanted is None:
        return None
    path = Path(wanted)
    if wanted == "last":
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or "."
        path = Path(folder) / "last.ckpt"
    if not path.exists():
        raise ValueError(f"{path} does not exist; there is no run to resume, leave --ckpt_path out")
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be resumed: {str(error).splitlines()[0]}") from None
    return path
