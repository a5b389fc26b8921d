"""RunFolder: where a training run keeps its checkpoints and its log, and what to do when it is interrupted.

`outputs/mine`, a predictor, has `outputs/mine.run` beside it: best.ckpt, last.ckpt, train.log. Two predictors never
share checkpoints.
"""

import logging
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.errors import first_line
from data.files import held
from data.shell import typed
from predictor.training.module import ForecasterModule

log = logging.getLogger(__name__)
LAST = "last.ckpt"
WRITTEN = {"state_dict", "hyper_parameters", "optimizer_states", "loops"}
"""Some of the keys of a checkpoint that train.py wrote."""


class RunFolder:
    """The folder of one predictor's training run.

    Attributes:
        predictor: Folder of the predictor.
        path: Folder of the run: the predictor's, with `.run` appended.
        log: File that receives what libraries log.
        checkpoints: Folder of the checkpoints: `path`, unless the configuration names another one.
    """

    def __init__(self, predictor: Path, trainer: Trainer) -> None:
        self.predictor, self.path = predictor, predictor.with_name(predictor.name + ".run")
        self.log = self.path / "train.log"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path.resolve())
        self.checkpoints = Path(getattr(trainer.checkpoint_callback, "dirpath", None) or self.path)
        self._first = trainer.is_global_zero

    def checkpoint(self, wanted: str | None, model: ForecasterModule) -> tuple[Path | None, str | None]:
        """The checkpoint file to resume, and the id of its W&B run; None and None for a fresh start.

        Args:
            wanted: Path of a checkpoint, "last" for this run's newest one, None for a fresh start.
            model: The module that is going to read it.

        Raises:
            ValueError: If there is no checkpoint, it is damaged, or it is of another architecture.
        """
        if wanted is None:
            if (self.checkpoints / LAST).exists() and not self.predictor.exists():
                log.warning(
                    "%s holds checkpoints of an unfinished run; this run starts anew and replaces them after its first "
                    "validation (--ckpt_path last would go on with them)",
                    self.checkpoints,
                )
            return None, None
        path = self.checkpoints / LAST if wanted == "last" else Path(wanted)
        state = read_checkpoint(path)
        wrote, wants = state["hyper_parameters"].get("architecture"), model.hparams["architecture"]
        if wrote != wants:
            raise ValueError(f"{path} is of architecture {wrote}, the configuration wants {wants}; make them agree")
        return path, state.get("wandb_run")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder inside the block; the processes of one run share it.

        Raises:
            ValueError: If another run is in it.
        """
        with held(self.path) if self._first else nullcontext():
            yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ends an interrupted run with exit code 130 and prints the command that resumes it.

        Lightning turns Ctrl-C during a fit into SystemExit. Before the first validation there is no checkpoint of this
        run: KeyboardInterrupt is raised then.
        """
        started = time.time()
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as stop:
            if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            last = self.checkpoints / LAST
            if not last.exists() or last.stat().st_mtime < started:
                raise KeyboardInterrupt from None
            program = sys.argv[0].split() if sys.argv[0].startswith("switchcast ") else ["python", sys.argv[0]]
            command = typed(shlex.join([*program, *sys.argv[1:]]))
            resume = "" if command.endswith("--ckpt_path last") else " --ckpt_path last"
            print(f"interrupted; go on with: {command}{resume}", file=sys.stderr)
            raise SystemExit(130) from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of train.py; no code in it is run.

    Raises:
        ValueError: If there is none, or it is damaged or something else.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; there is no run to resume, leave --ckpt_path out")
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch, pickle and zip each raise their own on a damaged file
        raise ValueError(f"{path} is no checkpoint that can be resumed: {first_line(error)}") from None
    if not isinstance(state, dict) or not state.keys() >= WRITTEN:
        raise ValueError(f"{path} is no checkpoint that can be resumed: no run of train.py wrote it")
    return state
