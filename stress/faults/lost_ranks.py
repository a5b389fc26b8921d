"""A rank that is killed or stopped at every stage of a run: the other rank ends soon, and its error names the lost one.

Two ranks run `runtime.infer`, or generate. The rank to be lost sends itself the signal when it comes to the stage.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from data.files import read_json
from data.text.batching import BatchingConfig
from runtime.engine.engine import Engine
from runtime.infer.__main__ import infer
from stress.faults.fault import Fault
from tests.conftest import TEXTS, write_switch
from tests.helpers.batches import batches
from tests.helpers.predictors import untrained
from tests.helpers.processes import on_ranks

TIMEOUT_S = 4.0
"""The engine's `timeout_s`."""
GRACE_S = 12.0
"""Seconds beyond it in which the other ranks must have ended: asking a store that does not respond takes 8.4."""
STOPS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: Its name.
        place: Module, and the function in it by whose call the stage is reached.
        rank: The rank that is lost: rank 0 forecasts, plans and writes the report.
        call: Which call of the function it is.
    """

    name: str
    place: tuple[str, str]
    rank: int
    call: int = 1


STAGES = (
    Stage("start", ("runtime.distributed.ranks", "Ranks._open_groups"), 1),
    Stage("loading", ("runtime.experts.weights", "FileWeights.fill"), 1, 3),
    Stage("forecast", ("runtime.engine.controller", "Controller._forecast"), 0, 3),
    Stage("plan", ("runtime.engine.controller", "Controller._plan"), 0, 3),
    Stage("move", ("runtime.experts.transfer", "WeightTransfer._write"), 1, 3),
    Stage("batch", ("runtime.experts.layer", "ReplicatedExperts.dispatch_and_combine"), 1, 5),
    Stage("batch, rank 0", ("runtime.experts.layer", "ReplicatedExperts.dispatch_and_combine"), 0, 5),
    Stage("generation", ("runtime.engine.generation", "DecoderSteps._before_step"), 1, 3),
    Stage("summary", ("runtime.infer.__main__", "summarise"), 1),
    Stage("report", ("runtime.infer.__main__", "write_json"), 0),
)


def strike_at(stage: Stage, number: signal.Signals, stamp: Path) -> None:
    """Has this process send itself a signal when it comes to a stage, and write down when that was."""
    owner: Any = import_module(stage.place[0])
    *parents, name = stage.place[1].split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    before, calls = getattr(owner, name), [0]

    def struck(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == stage.call:
            stamp.write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)
        return before(*args, **kwargs)

    setattr(owner, name, struck)


def run_rank(rank: int, stage: Stage, number: signal.Signals, folder: Path) -> tuple[str, float]:
    """Runs one rank; what it ended with, and seconds after the other one was struck."""
    stamp = folder / "struck"
    if rank == stage.rank:
        strike_at(stage, number, stamp)
    try:
        (_generate if stage.name == "generation" else _infer)(folder)
        ended = "ended"
    except Exception as error:  # which one it is, the table says
        ended = f"{type(error).__name__}: {error}"
    return ended, time.monotonic() - float(stamp.read_text()) if stamp.exists() else float("nan")


def _infer(folder: Path) -> None:
    infer(
        str(folder / "model"), folder / "predictor", text=str(folder / "words.txt"), redundant=4, batches=8,
        batching=BatchingConfig(batches=8, smallest=3, largest=3, length=32), check=False, allow_fallback=True,
        timeout=TIMEOUT_S, out=folder / "out",
    )  # fmt: skip


def _generate(folder: Path) -> None:
    with Engine(str(folder / "model"), None, None, 4, timeout_s=TIMEOUT_S) as engine:
        engine.generate(batches(1)[0].tokens, max_new_tokens=16, do_sample=False, replan_every=2)


def write_run(folder: Path) -> None:
    """Writes a model, a predictor and a text."""
    write_switch(folder / "model")
    untrained(folder / "model", folder / "predictor")
    (folder / "words.txt").write_text("\n".join(TEXTS * 40))


def check(stage: Stage, how: str, folder: Path) -> str:
    """Loses a rank and looks at the other one."""
    write_run(folder)
    torch.set_num_threads(1)
    results = on_ranks(2, run_rank, stage, STOPS[how], folder, timeout_s=90.0, abandoned=stage.rank)
    left, other = results[1 - stage.rank], f"rank {1 - stage.rank}"
    assert results[stage.rank] is None, f"rank {stage.rank} was not lost: {results[stage.rank]}"
    assert isinstance(left, tuple), f"{other}: {left}"
    ended, seconds = left
    report = folder / "out" / "report.json"
    written = report.exists()
    if written:
        assert read_json(report)["batches"] == 8
    if stage.name == "report":
        assert ended == "ended", f"{other}: {ended}"
        return f"{other} had ended; no half-written report"
    said = "2 processes did not meet" if stage.name == "start" else f"rank {stage.rank} is lost"
    assert ended.startswith(f"RankLostError: {said}"), f"{other}: {ended}"
    assert seconds < TIMEOUT_S + GRACE_S, f"{other} took {seconds:.0f} s"
    assert not written, "a report was written"
    return f"{ended.removeprefix('RankLostError: ').partition(' (')[0]}, after {seconds:.1f} s"


def _fault(stage: Stage, how: str) -> Fault:
    number = STOPS[how].name
    run: Callable[[Path], str] = partial(check, stage, how)
    promised = f"the other rank names it within {TIMEOUT_S + GRACE_S:.0f} s (timeout {TIMEOUT_S:.0f} s); no report"
    if stage.name == "report":
        promised = "the report is whole or absent"
    return Fault(f"{how} at {stage.name}", f"{number} to rank {stage.rank} of 2 at {stage.name}", promised, run)


FAULTS = [_fault(stage, how) for stage in STAGES for how in STOPS]
