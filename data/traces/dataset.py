"""TraceSamples: a torch dataset over a stored trace; each sample is a batch with the loads of the batches before it.

Loads of all batches are kept in memory (a few kilobytes each); tokens and routes are read as they are needed and pass
through a bounded shuffle pool.
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
from data.traces.trace import DECODE, PADDING, RouterTrace, TokenBatch

POOL = 1024
"""Most training batches in memory while shuffling."""
AHEAD = 8
"""Most tokens of a sequence that a training batch leaves unwritten."""


@dataclass(frozen=True)
class TraceSample:
    """One batch to train or evaluate on.

    Attributes:
        trace: The batch's tokens and their experts.
        load: Dispatched assignments of each expert in this batch, float32 `[L, E]`.
        history: Loads of the batches before it, oldest first, float32 `[K, L, E]`.
    """

    trace: RouterTrace
    load: Tensor
    history: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "TraceSample":
        """Copies the sample to another device; `non_blocking` does not wait for copies from pinned memory."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        changed: dict[str, Any] = {}
        for name, value in vars(self.trace).items():
            if isinstance(value, Tensor):
                changed[name] = moved(value)
            elif isinstance(value, TokenBatch):
                changed[name] = value.to(device, non_blocking)
        return TraceSample(replace(self.trace, **changed), moved(self.load), moved(self.history))


def sequence_loads(trace: RouterTrace, layout: MoELayout) -> Tensor:
    """Dispatched assignments of each sequence, `[B, L, E]`; their sum over sequences is the batch's load.

    Capacity applies per sequence, so a sequence's dispatched tokens are min(demand, capacity). This is much cheaper
    than `RouterTrace.load`, which determines the dropped tokens.
    """
    size, num_experts = len(trace.segments), layout.num_experts
    layers = []
    for number, ids_BTK in enumerate((*trace.experts, *trace.decoder_experts)):
        keys = (ids_BTK + num_experts * torch.arange(size)[:, None, None])[ids_BTK >= 0]
        demand = torch.bincount(keys, minlength=size * num_experts).view(size, num_experts)
        unlimited = layout.expert_capacity is None or (trace.stepwise and number >= layout.num_input_layers)
        layers.append(demand if unlimited else demand.clamp(max=layout.expert_capacity))
    return torch.stack(layers, 1)


def part(trace: RouterTrace, rows: Tensor) -> RouterTrace:
    """Makes a batch of some of a batch's sequences and trims its padding."""
    width, decoder_width = (int(t.mask[rows].sum(1).max()) for t in (trace.tokens, trace.decoder_tokens))
    return replace(
        trace,
        segments=tuple(trace.segments[row] for row in rows.tolist()),
        tokens=trace.tokens.rows(rows, width),
        decoder_tokens=trace.decoder_tokens.rows(rows, decoder_width),
        experts=trace.experts[:, rows, :width],
        decoder_experts=trace.decoder_experts[:, rows, :decoder_width],
        top_experts=None if (top := trace.top_experts) is None else top[:, rows, :width],
        top_probabilities=None if (p := trace.top_probabilities) is None else p[:, rows, :width],
    )


def as_decode(trace: RouterTrace, rng: np.random.Generator) -> RouterTrace:
    """Makes a decode step of a decoder-only model's text: up to `AHEAD` tokens at a random place of each sequence.

    The tokens before them become context, those behind them are left out.
    """
    computed = trace.tokens.computed
    counts = computed.sum(1).numpy()
    first = computed.int().argmax(1).numpy() + rng.integers(0, np.maximum(counts, 1))
    ahead = int(rng.integers(1, AHEAD + 1))
    place = torch.arange(computed.shape[1])
    start = torch.from_numpy(first)[:, None]
    mask = trace.tokens.mask & (place < start + ahead)
    kept = computed & mask & (place >= start)
    width = max(int(mask.sum(1).max()), 1)
    tokens = replace(trace.tokens, mask=mask, context=mask & ~kept).rows(slice(None), width)
    return replace(
        trace,
        phase=DECODE,
        tokens=tokens,
        decoder_tokens=trace.decoder_tokens,
        experts=trace.experts.masked_fill(~kept[..., None], PADDING)[:, :, :width],
        top_experts=None if (top := trace.top_experts) is None else top[:, :, :width],
        top_probabilities=None if (p := trace.top_probabilities) is None else p[:, :, :width],
    )


class TraceSamples(IterableDataset[TraceSample]):
    """Batches of one split, in order or shuffled by seed and epoch; every rank gets the same number of them.

    Args:
        trace: The stored trace.
        loads: Loads of all batches of the trace, `[steps, L, E]`.
        sizes: Split and number of sequences of each batch of the trace.
        split: "train", "val" or "test".
        window: Most past loads K in a sample's history.
        epoch: Function that returns the current epoch; batches are then cut and shuffled. None keeps them as recorded.
        sequences: Approximate number of sequences in each part that a batch is cut into.
        seed: Seed of cuts and shuffle.
        rank: Rank of this process, 0..world - 1.
        world: Number of processes that share the batches.
        decode: Share of shuffled training batches that become decode steps, for decoder-only models.
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
        decode: float = 0.0,
    ) -> None:
        self.decode = decode if trace.layout.causal else 0.0
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
        for sample in samples:  # complete turns only: every rank must run the same number of steps
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
                cut, load = part(sample.trace, rows), loads[rows].sum(0)
                if cut.phase != DECODE and rng.random() < self.decode:
                    cut = as_decode(cut, rng)
                    load = sequence_loads(cut, self.trace.layout).sum(0).float()
                pool.append(TraceSample(cut, load, sample.history))
            while len(pool) > POOL:
                yield pool.pop(int(rng.integers(len(pool))))
        for index in rng.permutation(len(pool)):
            yield pool[index]
