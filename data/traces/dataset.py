"""TraceSample and TraceSamples: the batches of a stored trace to learn from, each with the loads before it.

Only the loads are held whole (a few kilobytes a batch); tokens and routes pass through a bounded shuffle pool.
Shape suffixes: K past batches, L MoE layers, E logical experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from data.arrays import IntArray
from data.models.layout import MoELayout
from data.traces.store import StoredTrace
from data.traces.trace import RouterTrace, TokenBatch

POOL = 1024
"""Training batches in memory while shuffling."""


@dataclass(frozen=True)
class TraceSample:
    """One batch to learn from.

    Attributes:
        trace: Its tokens and where they were routed.
        load: Its dispatched tokens per expert, float32 `[L, E]`.
        history: Loads of the batches before it, oldest first, float32 `[K, L, E]`.
    """

    trace: RouterTrace
    load: Tensor
    history: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "TraceSample":
        """The same sample on another device."""
        trace = self.trace
        tokens = replace(trace.tokens, input_ids=trace.tokens.input_ids.to(device), mask=trace.tokens.mask.to(device))
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(trace).items() if isinstance(value, Tensor)
        }
        moved = replace(trace, tokens=tokens, **tensors)
        return TraceSample(moved, self.load.to(device), self.history.to(device))


def sequence_loads(trace: RouterTrace, layout: MoELayout) -> Tensor:
    """Dispatched tokens per sequence, `[B, L, E]`: their sum over sequences is the batch's load.

    Capacity counts per sequence, so its dispatched tokens are its demand cut off there: much cheaper than to find out
    which tokens were dropped, as `RouterTrace.load` does.
    """
    size, num_experts = len(trace.segments), layout.num_experts
    layers = []
    for number, ids in enumerate((*trace.encoder_experts, *trace.decoder_experts)):
        keys = (ids + num_experts * torch.arange(size)[:, None])[ids >= 0]
        demand = torch.bincount(keys, minlength=size * num_experts).view(size, num_experts)
        unlimited = trace.stepwise and number >= layout.num_encoder_layers
        layers.append(demand if unlimited else demand.clamp(max=layout.expert_capacity))
    return torch.stack(layers, 1)


def part(trace: RouterTrace, rows: Tensor) -> RouterTrace:
    """Some of a batch's sequences as a batch of their own, padding trimmed."""
    width, decoder_width = (int(t.mask[rows].sum(1).max()) for t in (trace.tokens, trace.decoder_tokens))

    def tokens(batch: TokenBatch, columns: int) -> TokenBatch:
        return TokenBatch(batch.input_ids[rows, :columns], batch.mask[rows, :columns])

    return replace(
        trace,
        segments=tuple(trace.segments[row] for row in rows.tolist()),
        tokens=tokens(trace.tokens, width),
        decoder_tokens=tokens(trace.decoder_tokens, decoder_width),
        encoder_experts=trace.encoder_experts[:, rows, :width],
        decoder_experts=trace.decoder_experts[:, rows, :decoder_width],
        encoder_probabilities=None,
        decoder_probabilities=None,
        encoder_top_experts=None if (top := trace.encoder_top_experts) is None else top[:, rows, :width],
        encoder_top_probabilities=None if (p := trace.encoder_top_probabilities) is None else p[:, rows, :width],
    )


class TraceSamples(IterableDataset[TraceSample]):
    """The batches of one split, in order or shuffled by seed and epoch; every rank gets as many as the others.

    Args:
        trace: The stored trace.
        loads: Loads of all its batches, `[steps, L, E]`.
        sizes: Split and sequences of each of its batches.
        split: "train", "val" or "test": the batches wanted.
        window: Most past loads to give with a batch.
        epoch: Tells the current epoch where batches are to be cut and shuffled, None where they stay as they came.
        sequences: About how many sequences a batch is cut into.
        seed: Seed of cuts and shuffle.
        rank: This process, 0..world - 1.
        world: Processes that share the batches.
    """

    def __init__(
        self,
        trace: StoredTrace,
        loads: IntArray,
        sizes: list[tuple[str, int]],
        split: str,
        window: int,
        epoch: Callable[[], int] | None = None,
        sequences: int = 16,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.trace, self.loads, self.split, self.window = trace, torch.from_numpy(loads).float(), split, window
        mine = [size for name, size in sizes if name == split]
        self.count = len(mine) if epoch is None else sum(self._parts(size, sequences) for size in mine)
        self.epoch, self.sequences, self.seed = epoch, sequences, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.count // self.world

    def __iter__(self) -> Iterator[TraceSample]:
        samples = self._in_order() if self.epoch is None else self._shuffled(self.epoch())
        turn = []
        for sample in samples:  # whole turns only, so that no rank waits for a batch that another one lacks
            turn.append(sample)
            if len(turn) == self.world:
                yield turn[self.rank]
                turn = []

    @staticmethod
    def _parts(size: int, sequences: int) -> int:
        return max(round(size / sequences), 1)

    def _in_order(self, shards: list[int] | None = None) -> Iterator[TraceSample]:
        about = self.trace.about
        for number in range(len(about["shards"])) if shards is None else shards:
            alone = replace(self.trace, about=about | {"shards": [about["shards"][number]]}, only=self.split)
            for trace in alone.traces():
                step = trace.batch
                yield TraceSample(trace, self.loads[step], self.loads[max(step - self.window, 0) : step])

    def _shuffled(self, epoch: int) -> Iterator[TraceSample]:
        rng = np.random.default_rng((self.seed, epoch))
        pool: list[TraceSample] = []
        for sample in self._in_order(rng.permutation(len(self.trace.about["shards"])).tolist()):
            size = len(sample.trace.segments)
            loads = sequence_loads(sample.trace, self.trace.layout).float()
            for rows in torch.from_numpy(rng.permutation(size)).tensor_split(self._parts(size, self.sequences)):
                pool.append(TraceSample(part(sample.trace, rows), loads[rows].sum(0), sample.history))
            while len(pool) > POOL:
                yield pool.pop(int(rng.integers(len(pool))))
        for index in rng.permutation(len(pool)):
            yield pool[index]
