"""What the engine is given and what it gives: batches, their answers, and what they took."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.arrays import FloatArray, IntArray
from data.traces.trace import TokenBatch
from runtime.engine.controller import Preparation


@dataclass(frozen=True)
class ModelBatch:
    """One batch for an encoder-decoder model.

    Attributes:
        tokens: Encoder tokens `[B, T]`.
        decoder: Decoder input tokens `[B, U]`; None runs the encoder alone.

    Raises:
        TypeError: If these are no token batches.
        ValueError: If they differ in the number of sequences.
    """

    tokens: TokenBatch
    decoder: TokenBatch | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("decoder", self.decoder)):
            if not isinstance(value, TokenBatch) and not (name == "decoder" and value is None):
                kind = type(value).__name__
                raise TypeError(
                    f"{name} is a {kind}, expected data.traces.trace.TokenBatch(input_ids [B, T], mask [B, T])"
                )
        if self.decoder is not None and len(self.decoder.mask) != len(self.tokens.mask):
            raise ValueError(f"{len(self.tokens.mask)} sequences, but decoder tokens of {len(self.decoder.mask)}")

    def rows(self, rank: int, world: int) -> slice:
        """The sequences that one of several ranks runs: as many as the others', or one less."""
        size = len(self.tokens.mask)
        return slice(rank * size // world, (rank + 1) * size // world)

    def part(self, rows: slice) -> "ModelBatch":
        """Some sequences; where there are none, one of padding, so that the rank still takes part."""
        decoder = None if self.decoder is None else _part(self.decoder, rows)
        return ModelBatch(_part(self.tokens, rows), decoder)


def _part(tokens: TokenBatch, rows: slice) -> TokenBatch:
    if rows.start == rows.stop:
        return TokenBatch(tokens.input_ids[:1], torch.zeros_like(tokens.mask[:1]))
    return TokenBatch(tokens.input_ids[rows], tokens.mask[rows])


def needed_positions(mask: Tensor) -> Tensor:
    """Positions a model must compute, `[B, T]`: all up to the last real token of a sequence.

    What comes behind it is never read. Padding in front is computed: it takes up experts' capacity, and so decides
    which of the tokens behind it are dropped.
    """
    return mask.flip(1).cummax(1).values.flip(1)


@dataclass(frozen=True)
class BatchStats:
    """What a batch took, over all ranks.

    Attributes:
        load: Tokens of each expert, `[L, E]`.
        device_load: Tokens each device computed, `[L, G]`.
        sent: Tokens that left their rank, `[L]`.
        busy_ms: Milliseconds each device computed experts, `[L, G]`.
        waited_ms: Milliseconds each rank waited for others, `[L, S]`; zeros with one rank.
        compute_ms: Milliseconds of the whole forward on this rank.
        exposed_ms: Milliseconds this rank waited for the preparation before it.
        preparation: What was done ahead of this batch; None where nothing was ready.
        tiers: What each tier of this rank's cache did so far (see `CacheStats`); empty where all fits.
    """

    load: IntArray
    device_load: IntArray
    sent: IntArray
    busy_ms: FloatArray
    waited_ms: FloatArray
    compute_ms: float
    exposed_ms: float
    preparation: Preparation | None
    tiers: dict[str, dict[str, int | float]] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchOutput:
    """A batch's answer and what it took.

    Attributes:
        logits: Of this rank's sequences, `[b, U, V]`, or the encoder's last hidden state `[b, T, D]` where the decoder
            did not run.
        rows: Which of the batch's sequences they are.
        stats: What it took.
    """

    logits: Tensor
    rows: slice
    stats: BatchStats


@torch.inference_mode()
def forward(model: Any, batch: ModelBatch) -> Tensor:
    """The model's answer to a batch, plain or with slots: logits `[B, U, V]`, or encoder states `[B, T, D]`."""
    ids, attention = batch.tokens.input_ids.to(model.device), batch.tokens.mask.long().to(model.device)
    if batch.decoder is None:
        states: Tensor = model.encoder(input_ids=ids, attention_mask=attention)[0]
        return states
    decoder_ids = batch.decoder.input_ids.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=attention, decoder_input_ids=decoder_ids).logits
    return logits
