"""LoadStream: the steps of a recording, read one after the other as often as wanted; not all of them are in memory.

    stream = open_stream(Path("outputs/traces/converted"))
    for step in stream.steps():
        step.load  # [L, E]

A trace of counts is read from Parquet, shard by shard; other recordings that `data.traces.loads` reads are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from data.arrays import IntArray
from data.traces.loads import Counts, RecordedLoads, check_counts, check_loads, log_empty, read_loads
from data.traces.recordings import TRACE_JSON

if TYPE_CHECKING:  # they import torch
    from data.models.layout import MoELayout
    from data.traces.store import StoredTrace
    from data.traces.trace import TokenBatch


class Step(NamedTuple):
    """One step of a recording.

    Attributes:
        load: Tokens of each expert, `[L, E]`.
        upcoming: What is known of its input tokens before it runs; None where only counts were recorded.
        sequences: Loads of each sequence, `[B, L, E]`; None unless requests were served.
    """

    load: IntArray
    upcoming: "TokenBatch | None" = None
    sequences: Counts | None = None


@dataclass(frozen=True)
class LoadStream:
    """The steps of a recording that hold tokens, and what one reading of all of them tells.

    Attributes:
        name: Path of the recording.
        steps: Begins a new reading of the steps, in order.
        num_steps: How many hold tokens.
        empty_steps: How many hold none, and are left out.
        num_layers: Layers that were recorded.
        num_experts: Experts of a layer.
        layers: Numbers of the layers that got tokens in some step; dense layers, and those that did not run, got none.
        mean_tokens: Assignments of a layer in a step, mean over those that are not 0.
        most_tokens: The most assignments of a layer in a step.
        layout: The model's layout; None where only counts were recorded.
        served: Whether the loads of each sequence are known.
    """

    name: str
    steps: Callable[[], Iterator[Step]]
    num_steps: int
    empty_steps: int
    num_layers: int
    num_experts: int
    layers: IntArray
    mean_tokens: float
    most_tokens: int
    layout: "MoELayout | None" = None
    served: bool = False

    @classmethod
    def read(
        cls,
        name: str,
        source: Callable[[], Iterator[Step]],
        empty_steps: int = 0,
        layout: "MoELayout | None" = None,
        served: bool = False,
    ) -> "LoadStream":
        """Reads a source of steps once, and leaves steps without tokens out of later readings.

        Args:
            name: Path of the recording.
            source: Begins a new reading of all steps; each reading gives the same.
            empty_steps: Steps that were left out before.
            layout: The model's layout.
            served: Whether the loads of each sequence are known.

        Raises:
            ValueError: If no step has tokens.
        """
        steps, full, layer_steps, total, most = 0, 0, 0, 0, 0
        carried_L: IntArray = np.zeros(0, dtype=bool)
        layers, experts = 0, 0
        for step in source():
            tokens_L, (layers, experts) = step.load.sum(-1), step.load.shape
            carried_L = tokens_L > 0 if not steps else carried_L | (tokens_L > 0)
            steps, full = steps + 1, full + bool(tokens_L.any())
            layer_steps, total = layer_steps + int((tokens_L > 0).sum()), total + int(tokens_L.sum())
            most = max(most, int(tokens_L.max()))
        log_empty(name, steps, steps - full)
        return cls(
            name, partial(_with_tokens, source), full, empty_steps + steps - full, layers, experts,
            np.flatnonzero(carried_L), total / layer_steps, most, layout, served,
        )  # fmt: skip

    @classmethod
    def of(cls, recorded: RecordedLoads) -> "LoadStream":
        """The steps of a recording that is in memory."""
        return cls.read(
            recorded.name, partial(_in_memory, recorded), recorded.empty_steps, recorded.layout,
            served=recorded.sequences is not None,
        )  # fmt: skip


Recorded = LoadStream | RecordedLoads | Path | str | npt.NDArray[np.int64]
"""What `as_stream` takes."""


def as_stream(recorded: Recorded) -> LoadStream:
    """The steps of loads `[N, L, E]`, of a recording in memory, or of one at a path.

    Raises:
        ValueError: If the path is no recording, or the loads are none.
    """
    if isinstance(recorded, LoadStream):
        return recorded
    if isinstance(recorded, (Path, str)):
        return open_stream(Path(recorded))
    if isinstance(recorded, RecordedLoads):
        return LoadStream.of(recorded)
    return LoadStream.of(RecordedLoads("array", check_loads(np.asarray(recorded), Path("the array"))))


def open_stream(path: Path) -> LoadStream:
    """Opens a recording of any format that `data.traces.loads` lists, and reads it once.

    Raises:
        ValueError: If the path is no recording, or the recording is damaged or holds something other than counts.
    """
    if (path / TRACE_JSON).exists():
        from data.traces.store import open_trace

        trace = open_trace(path)
        if trace.about["granularity"] == "counts":  # its layout knows the number of experts, not their size
            return LoadStream.read(str(path), partial(_from_shards, trace))
    return LoadStream.of(read_loads(path))


def _with_tokens(source: Callable[[], Iterator[Step]]) -> Iterator[Step]:
    return (step for step in source() if step.load.any())


def _in_memory(recorded: RecordedLoads) -> Iterator[Step]:
    return map(Step, recorded.loads, recorded.batches or repeat(None), recorded.sequences or repeat(None))


def _from_shards(trace: "StoredTrace") -> Iterator[Step]:
    for path, loads in trace.load_shards():
        yield from map(Step, check_counts(loads, path).astype(np.int64, copy=False))
