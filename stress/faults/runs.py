"""Trainings whose Weights & Biases cannot be reached, and two runs of a command at once."""

import subprocess
from functools import partial
from pathlib import Path

from predictor.checkpoint import load_predictor
from stress.faults.commands import command, environment, run
from stress.faults.disks import WRITERS, training
from stress.faults.fault import Fault
from stress.faults.lost_ranks import write_run

NOWHERE = "http://127.0.0.1:9"
"""An address at which nothing listens."""


def wandb(folder: Path) -> str:
    """Trains with an online W&B logger and no network."""
    logger = "--trainer.logger"
    online = [f"{logger}=lightning.pytorch.loggers.WandbLogger", f"{logger}.name=null", f"{logger}.save_dir=outputs",
              f"{logger}.offline=false"]  # fmt: skip
    ended = run(
        "train", *training(folder, folder), *online, folder=folder, timeout_s=400, WANDB_BASE_URL=NOWHERE,
        WANDB_API_KEY="0" * 40, WANDB_MODE="online",
    )  # fmt: skip
    ended.succeeded()
    (said,) = [line for line in ended.err.splitlines() if line.startswith("W&B cannot be reached")]
    load_predictor(folder / "predictor")
    assert list((folder / "outputs" / "wandb").glob("offline-run-*/run-*.wandb")), "no run is on disk"
    return f"exit code 0 after {ended.seconds:.0f} s; {said}"


def twice(what: str, folder: Path) -> str:
    """Starts the same command twice at the same time, with the same place to write to."""
    write_run(folder)
    (folder / "out").mkdir()
    module, words, read = WRITERS[what]
    line = command(module, *words(folder, folder / "out"))
    both = [
        subprocess.Popen(line, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    for code, err in zip(codes, ended, strict=True):
        assert code in (0, 2), f"exit code {code}: {err[-1500:]}"
        assert "Traceback" not in err, err[-1500:]
    assert 0 in codes, f"both failed: {ended[0][-500:]} {ended[1][-500:]}"
    read(folder / "out")
    said = [err.strip().splitlines()[-1] for code, err in zip(codes, ended, strict=True) if code == 2]
    return f"exit codes {codes[0]} and {codes[1]}; the result is whole" + "".join(f"; {line}" for line in said)


FAULTS = [
    Fault(
        "W&B unreachable", "`train` logs online, and nothing listens at W&B's address",
        "the training ends well; it says that the run stays on disk, and there it is", wandb,
    ),
    *(
        Fault(
            f"twice, {what}", f"`{WRITERS[what][0]}` twice at once, with one place to write to",
            "each succeeds or is refused in one line, one succeeds, and the result is whole", partial(twice, what),
        )
        for what in WRITERS
    ),
]  # fmt: skip
