"""Reads of experts that are slow or fail while a model runs within a memory budget."""

import copy
import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.models.model import load_model
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from stress.faults.fault import Fault
from tests.conftest import small_switch, write_switch
from tests.helpers.batches import batches, largest_difference
from tests.helpers.budgets import budget
from tests.helpers.processes import on_ranks

MOST_DIFFERENCE = 1e-5


@contextmanager
def reads(change: Callable[[], None]) -> Iterator[None]:
    """Calls a function before every read of an expert."""
    before = os.preadv

    def preadv(*args: Any) -> int:
        change()
        return before(*args)

    os.preadv = preadv
    try:
        yield
    finally:
        os.preadv = before


def write_shards(folder: Path) -> list[Path]:
    """Writes the random model in several files."""
    write_switch(folder)
    (folder / "model.safetensors").unlink()
    small_switch().save_pretrained(folder, max_shard_size="60KB")
    return sorted(folder.glob("*.safetensors"))


def within_budget(rank: int, how: str, folder: Path) -> dict[str, str]:
    """Runs batches within a budget of 2 of 16 experts while reads go wrong, and after."""
    torch.set_num_threads(1)
    shards = write_shards(folder / "model")
    plain = copy.deepcopy(load_model(str(folder / "model")).model)
    stream = batches(4)
    with Engine(str(folder / "model"), device_memory=budget(2)) as engine:
        assert largest_difference(engine, plain, stream) <= MOST_DIFFERENCE
        with HOW[how](shards):
            said = _run(engine, plain, stream)
        after = largest_difference(engine, plain, stream)
        assert after <= MOST_DIFFERENCE, f"afterwards outputs differ by {after}"
    return {"during": said, "after": f"difference {after:.0e}"}


def _run(engine: Engine, plain: Any, stream: list[ModelBatch]) -> str:
    """What a run said: its error, or how far outputs are from the plain model's."""
    began, worst = time.monotonic(), 0.0
    try:
        for batch, output in zip(stream, engine.run(stream), strict=True):
            real = batch.decoder.mask  # type: ignore[union-attr]
            worst = max(worst, float((output.logits[real] - forward(plain, batch)[real]).abs().max()))
            assert worst <= MOST_DIFFERENCE, f"outputs differ by {worst}"
    except OSError as error:
        said = str(error)
    else:
        return f"{len(stream)} batches in {time.monotonic() - began:.1f} s, difference {worst:.0e}"
    assert ".safetensors" in said, f"the file is not named: {said}"
    return f"OSError: {Path(said).name}"


@contextmanager
def slow(shards: list[Path]) -> Iterator[None]:
    """Every read takes 20 ms longer."""
    with reads(lambda: time.sleep(0.02)):
        yield


@contextmanager
def failing(shards: list[Path]) -> Iterator[None]:
    """Every third read fails as a broken disk does."""
    count = [0]

    def fail() -> None:
        count[0] += 1
        if count[0] % 3 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with reads(fail):
        yield


@contextmanager
def truncated(shards: list[Path]) -> Iterator[None]:
    """All files but the first lose their second half."""
    whole = {path: path.read_bytes() for path in shards[1:]}
    for path, content in whole.items():
        os.truncate(path, len(content) // 2)
    yield
    for path, content in whole.items():
        with path.open("r+b") as file:
            file.write(content)


@contextmanager
def removed(shards: list[Path]) -> Iterator[None]:
    """All files are removed; they stay readable where they are open."""
    for path in shards:
        path.unlink()
    yield


HOW = {"slow": slow, "failing": failing, "truncated": truncated, "removed": removed}
DONE = {
    "slow": ("every read of an expert takes 20 ms longer", "outputs are the plain model's, later"),
    "failing": ("every third read ends with EIO", "OSError that names the file; afterwards the engine goes on"),
    "truncated": (
        "the model's files are cut in half during a run",
        "OSError that names the file; with the files whole again the engine goes on",
    ),
    "removed": ("the model's files are removed during a run", "outputs are the plain model's: the files are open"),
}  # fmt: skip


def tier(how: str, folder: Path) -> str:
    """Runs it in a process of its own."""
    (result,) = on_ranks(1, within_budget, how, folder, timeout_s=90.0)
    assert isinstance(result, dict), result
    assert result["during"].startswith("OSError") == (how in ("failing", "truncated")), result
    return f"{result['during']}; afterwards {result['after']}"


FAULTS = [Fault(f"{how} reads", *DONE[how], partial(tier, how)) for how in HOW]
