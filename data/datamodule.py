"""RouterTraceModule: a stored trace as Lightning wants it, streamed shard by shard, each batch with its past loads.

Only the loads are held whole (a few kilobytes a batch); tokens and routes pass through a bounded shuffle pool.
Shape suffixes: K past batches, L MoE layers, E logical experts.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.collect import collect
from data.layout import MoELayout
from data.store import StoredTrace, open_trace
from data.trace import IntArray, RouterTrace, TokenBatch
from data.traffic import Traffic
from data.weights import BUNDLED

POOL = 1024
"""Training batches in memory while shuffling."""
log = logging.getLogger(__name__)


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
        moved = replace(trace, tokens=tokens, encoder_experts=trace.encoder_experts.to(device))
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
        starts = np.cumsum([0] + [shard["batches"] for shard in about["shards"]])
        for number in range(len(about["shards"])) if shards is None else shards:
            alone = replace(self.trace, about=about | {"shards": [about["shards"][number]]})
            for step, trace in enumerate(alone.traces(), start=int(starts[number])):
                if trace.split == self.split:
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


class RouterTraceModule(LightningDataModule):
    """Train, validation and test batches of one trace; the trace is collected first if it is not there.

    Args:
        trace: Folder of the trace.
        model: The model it must be of; it is what is traced if the folder does not exist.
        window: Past loads given with each batch.
        sequences: About how many sequences a training batch holds: the trace's batches are cut at random, since more
            and smaller steps teach more in the same time.
        seed: Seed of the cuts and the order of training batches.
        traffic: What the stream of batches looks like where a trace must be collected first.
    """

    layout: MoELayout

    def __init__(
        self,
        trace: Path = Path("outputs/traces/switch-mini-64"),
        model: str = BUNDLED,
        window: int = 64,
        sequences: int = 16,
        seed: int = 0,
        traffic: Traffic = Traffic(),
    ) -> None:
        super().__init__()
        self.path, self.model, self.window = trace, model, window
        self.sequences, self.seed, self.traffic = sequences, seed, traffic

    def prepare_data(self) -> None:
        """Collects the trace if it is missing; runs on one process only."""
        if self.path.exists():
            log.info("reusing the trace in %s", self.path)
        else:
            log.info("no trace in %s yet; collecting one from %s", self.path, self.model)
            collect(model=self.model, out=self.path, traffic=self.traffic)

    def setup(self, stage: str | None = None) -> None:
        """Opens the trace and derives its loads, once.

        Raises:
            ValueError: If the trace is of another model, or a split that training needs is empty.
        """
        if hasattr(self, "trace"):
            return
        trace = open_trace(self.path)
        if trace.layout.model_id != self.model:
            raise ValueError(
                f"{self.path} is a trace of {trace.layout.model_id}, the configuration names {self.model}; "
                "give --data.trace or --data.model so that they agree"
            )
        loads, sizes = [], []
        for batch in trace.traces():
            loads.append(sequence_loads(batch, trace.layout).sum(0).numpy())
            sizes.append((batch.split, len(batch.segments)))
        self.splits = [split for split, _ in sizes]
        for needed in ("train", "val", "test"):
            if needed not in self.splits:
                raise ValueError(
                    f"{self.path} has {len(sizes)} batches, none of them in the {needed} split; collect more"
                )
        self.trace, self.loads, self.sizes, self.layout = trace, np.stack(loads), sizes, trace.layout

    def samples(self, split: str) -> TraceSamples:
        """The batches of a split in their order."""
        return TraceSamples(self.trace, self.loads, self.sizes, split, self.window)

    def tokens(self, split: str) -> Iterator[TokenBatch]:
        """The encoder tokens of a split's batches, in their order."""
        return (sample.trace.tokens for sample in self.samples(split))

    def train_dataloader(self) -> DataLoader[TraceSample]:
        """Training batches, shuffled anew each epoch and shared out over the processes."""
        trainer = self.trainer
        assert trainer is not None
        samples = TraceSamples(
            self.trace, self.loads, self.sizes, "train", self.window, lambda: trainer.current_epoch,
            self.sequences, self.seed, trainer.global_rank, trainer.world_size,
        )  # fmt: skip
        return DataLoader(samples, batch_size=None)

    def val_dataloader(self) -> DataLoader[TraceSample]:
        """Validation batches in order, all of them on every process."""
        return DataLoader(self.samples("val"), batch_size=None)

    def test_dataloader(self) -> DataLoader[TraceSample]:
        """Test batches in order, all of them on every process."""
        return DataLoader(self.samples("test"), batch_size=None)
