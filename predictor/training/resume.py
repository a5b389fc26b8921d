"""Which checkpoint a user means to resume from, and whether it can be."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from lightning import Trainer

from predictor.training.module import ForecasterModule

WRITTEN = {"state_dict", "hyper_parameters", "optimizer_states", "loops"}
"""What a checkpoint of train.py holds, among others."""


def checkpoint_to_resume(trainer: Trainer, model: ForecasterModule, wanted: str | None) -> Path | None:
    """The checkpoint file that a user means by a path or by "last"; None for a fresh start.

    Raises:
        ValueError: If there is none, it is damaged, or it is of another architecture.
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
        state = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be resumed: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not state.keys() >= WRITTEN:
        raise ValueError(f"{path} is no checkpoint that can be resumed: no run of train.py wrote it")
    wrote, wants = state["hyper_parameters"].get("architecture"), model.hparams["architecture"]
    if wrote != wants:
        raise ValueError(f"{path} is of architecture {wrote}, the configuration wants {wants}; make them agree")
    return path
