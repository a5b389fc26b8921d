"""RouterTraceModule: Lightning data module of a stored trace, which is collected first if it is missing."""

import logging
from pathlib import Path

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from data.collect import collect
from data.models.layout import MoELayout
from data.models.weights import BUNDLED
from data.text.batching import BatchingConfig
from data.traces.dataset import TraceSample, TraceSamples, sequence_loads
from data.traces.store import open_trace
from data.traces.trace import TokenBatch

log = logging.getLogger(__name__)


class RouterTraceModule(LightningDataModule):
    """Train, validation and test batches of one trace.

    Args:
        trace: Folder of the trace; if it does not exist, the trace is collected first.
        model: Model to collect a trace from, if it does not exist: a local folder or a hub id; 'switch-mini-64'
            (bundled) by default. A trace that exists must be of this model, if one is given.
        revision: Revision of a hub model; a trace that exists must be of it, if one is given.
        window: Most past loads in a sample's history.
        sequences: Approximate number of sequences in a training batch. The trace's batches are cut at random, because
            more and smaller steps learn more in the same time.
        seed: Seed of the cuts and of the order of training batches.
        top: Likeliest experts logged for each input token if the trace is collected, for distillation.
        batching: Settings that cut text into batches if the trace is collected.
        decode: Share of training batches (0 to 1) that become decode steps, whose tokens are not written yet, where the
            trace is of a decoder-only model; without them a predictor does not learn to forecast such steps.
    """

    layout: MoELayout

    def __init__(
        self,
        trace: Path = Path("outputs/traces/switch-mini-64"),
        model: str | None = None,
        window: int = 64,
        sequences: int = 8,
        seed: int = 0,
        top: int = 0,
        batching: BatchingConfig = BatchingConfig(),
        decode: float = 0.25,
        revision: str = "",
    ) -> None:
        if not 0 <= decode <= 1:
            raise ValueError(f"decode is {decode}, expected a share of training batches, 0 to 1")
        super().__init__()
        self.path, self.model, self.revision, self.window = trace, model, revision, window
        self.sequences, self.seed, self.top, self.batching, self.decode = sequences, seed, top, batching, decode

    def prepare_data(self) -> None:
        """Collects the trace if it is missing; Lightning calls this on one process only."""
        if self.path.exists():
            log.info("trace %s: %d batches", self.path, open_trace(self.path).num_batches)
        else:
            log.info("no trace in %s yet; collecting one from %s", self.path, self.model or BUNDLED)
            collect(
                model=self.model or BUNDLED, revision=self.revision, out=self.path, batching=self.batching,
                top=self.top,
            )  # fmt: skip

    def setup(self, stage: str | None = None) -> None:
        """Opens the trace and derives its loads; later calls do nothing.

        Raises:
            ValueError: If the trace is of another model, or one of its splits is empty.
        """
        if hasattr(self, "trace"):
            return
        trace = open_trace(self.path)
        if self.model not in (None, trace.layout.model_id):
            raise ValueError(
                f"{self.path} is a trace of {trace.layout.model_id}, the configuration names {self.model}; "
                "give --data.trace or --data.model so that they agree"
            )
        if self.revision not in ("", trace.layout.revision):
            raise ValueError(
                f"{self.path} is a trace of revision '{trace.layout.revision}' of {trace.layout.model_id}, the "
                f"configuration names '{self.revision}'; give --data.trace or --data.revision so that they agree"
            )
        loads, sizes = [], []
        for batch in trace.traces():
            _check_tokens(self.path, batch.tokens, trace.layout.vocab_size)
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
        """The batches of a split, in their order."""
        return TraceSamples(self.trace, self.loads, self.sizes, split, self.window)

    def train_dataloader(self) -> DataLoader[TraceSample]:
        """Training batches, shuffled differently in each epoch and divided among the processes."""
        trainer = self.trainer
        assert trainer is not None
        samples = TraceSamples(
            self.trace, self.loads, self.sizes, "train", self.window, lambda: trainer.current_epoch,
            self.sequences, self.seed, trainer.global_rank, trainer.world_size, self.decode,
        )  # fmt: skip
        return DataLoader(samples, batch_size=None)

    def val_dataloader(self) -> DataLoader[TraceSample]:
        """All validation batches in order, on every process."""
        return DataLoader(self.samples("val"), batch_size=None)

    def test_dataloader(self) -> DataLoader[TraceSample]:
        """All test batches in order, on every process."""
        return DataLoader(self.samples("test"), batch_size=None)


def _check_tokens(path: Path, tokens: TokenBatch, vocabulary: int) -> None:
    if (ids := tokens.input_ids[tokens.mask]).numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"{path} holds token ids {int(ids.min())} to {int(ids.max())}, its model has a vocabulary of {vocabulary}; "
            "collect the trace again"
        )
