"""What the engine is given and what it returns: batches, their outputs, and what each one took."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.arrays import FloatArray, IntArray
from data.models.generation import padding_id, start_id
from data.traces.trace import TokenBatch
from runtime.balancing.split import balancedness, mean_balancedness
from runtime.distributed.device import to_device
from runtime.distributed.ranks import rows_of
from runtime.engine.controller import Preparation

IGNORED_LABEL = -100
"""Label that a loss leaves out, as in transformers."""


NOT_TAKEN = ("position_ids", "past_key_values", "inputs_embeds")
"""Inputs of models that would change outputs and that `Engine.run` does not take."""


@dataclass(frozen=True)
class ModelBatch:
    """One batch for a model.

    Attributes:
        tokens: Tokens `[B, T]`, of the encoder where there is one.
        decoder: Decoder input tokens `[B, U]` of an encoder-decoder model; None runs its encoder alone. A decoder-only
            model has none.

    Raises:
        TypeError: If these are no tokens; see `TokenBatch.of`.
        ValueError: If they differ in the number of sequences.
    """

    tokens: TokenBatch
    decoder: TokenBatch | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", TokenBatch.of(self.tokens))
        if self.decoder is None:
            return
        object.__setattr__(self, "decoder", TokenBatch.of(self.decoder))
        if len(self.decoder.mask) != len(self.tokens.mask):
            raise ValueError(f"{len(self.tokens.mask)} sequences, but decoder tokens of {len(self.decoder.mask)}")

    @classmethod
    def of(cls, inputs: Any, config: Any) -> "ModelBatch":
        """Accepts a `ModelBatch`, or what a tokenizer returns.

        Args:
            inputs: A mapping with `input_ids` and `attention_mask`, and with `decoder_input_ids` (and
                `decoder_attention_mask`) or `labels`; with neither, the decoder is fed its start token. A
                decoder-only model is fed `input_ids` alone.
            config: The model's configuration: its vocabulary, start and padding tokens.
        """
        both = config.is_encoder_decoder
        if isinstance(inputs, cls):
            batch = inputs
        else:
            given = inputs if isinstance(inputs, Mapping) else {}
            if ignored := [name for name in NOT_TAKEN if given.get(name) is not None]:
                raise ValueError(
                    f"{ignored[0]} was given; a batch is input_ids and attention_mask, and the engine sets positions "
                    "itself: leave it out, or call the model inside `with engine:`"
                )
            batch = cls(TokenBatch.of(inputs), _decoder_tokens(inputs, config) if both else None)
        if batch.decoder is not None and not both:
            raise ValueError(
                f"decoder tokens were given, and a {config.model_type} model has no encoder; leave them out"
            )
        check_tokens(batch.tokens, config)
        if batch.decoder is not None:
            check_tokens(batch.decoder, config)
        return batch

    def rows(self, rank: int, world: int) -> slice:
        """The sequences that one of several ranks runs; see `rows_of`."""
        return rows_of(len(self.tokens.mask), rank, world)

    def part(self, rows: slice) -> "ModelBatch":
        """Some of the sequences; if there are none, one of padding, so that the rank still joins the collectives."""
        decoder = None if self.decoder is None else _part(self.decoder, rows)
        return ModelBatch(_part(self.tokens, rows), decoder)


def check_tokens(tokens: TokenBatch, config: Any) -> None:
    """Refuses tokens that a model cannot be fed.

    Raises:
        ValueError: If there are none, or an id is outside of the vocabulary.
    """
    if not tokens.input_ids.numel():
        shape = tuple(tokens.input_ids.shape)
        raise ValueError(f"input_ids have shape {shape}, expected at least one sequence and one token")
    vocabulary = config.get_text_config().vocab_size
    low, high = int(tokens.input_ids.min()), int(tokens.input_ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids are {low} to {high}, expected 0 to {vocabulary - 1}")


def _part(tokens: TokenBatch, rows: slice) -> TokenBatch:
    if rows.start == rows.stop:
        return TokenBatch(tokens.input_ids[:1], torch.zeros_like(tokens.mask[:1]))
    return tokens.rows(rows)


def _decoder_tokens(inputs: Any, config: Any) -> TokenBatch:
    """What the decoder is fed: the tokens given, labels shifted to the right, or its start token alone."""
    given = inputs if isinstance(inputs, Mapping) else {}
    if given.get("decoder_input_ids") is not None:
        mask = given.get("decoder_attention_mask")
        return TokenBatch.of({"input_ids": given["decoder_input_ids"], "attention_mask": mask})
    start = start_id(config)
    if given.get("labels") is None:
        first = torch.full((len(TokenBatch.of(inputs).mask), 1), start)
        return TokenBatch(first, torch.ones_like(first, dtype=torch.bool))
    labels = TokenBatch.of({"input_ids": given["labels"]}).input_ids
    shifted = labels.roll(1, 1)
    shifted = shifted.masked_fill(shifted == IGNORED_LABEL, padding_id(config))
    shifted[:, 0] = start
    return TokenBatch(shifted, labels != IGNORED_LABEL)


@dataclass(frozen=True)
class BatchStats:
    """What a batch took, over all ranks.

    Attributes:
        load: Assignments of each expert that were computed, `[L, E]`: tokens, or with top-k routing K for each token.
        device_load: Assignments that each device computed, `[L, G]`.
        sent: Assignments that were sent to another rank, `[L]`.
        busy_ms: Milliseconds that each device computed experts, `[L, G]`; NaN if times were not measured.
        waited_ms: Milliseconds that each rank waited for other ranks, `[L, S]`, likewise; zeros with one rank.
        compute_ms: Milliseconds of the whole forward on this rank, likewise.
        exposed_ms: Milliseconds that this rank waited for the preparation before the forward.
        preparation: What was done ahead of this batch; None if nothing was ready.
        tiers: Counters of each tier of this rank's cache so far (see `CacheStats`); empty if all experts fit.
        sequence_load: The load of each of this rank's sequences, `[b, L, E]`; None if no forecaster learns from it.
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
    sequence_load: IntArray | None = None

    @property
    def measured(self) -> bool:
        """Whether times were measured."""
        return not np.isnan(self.compute_ms)

    @property
    def layer_balancedness(self) -> FloatArray:
        """Mean device load over the largest one in each MoE layer, `[L]`; 1 is perfect, NaN a layer without tokens."""
        return balancedness(self.device_load)

    @property
    def balancedness(self) -> float:
        """Mean of `layer_balancedness` over the layers with tokens; a decoder that did not run has none."""
        return mean_balancedness(self.device_load)


@dataclass(frozen=True)
class BatchOutput:
    """The output of a batch and what it took.

    Attributes:
        logits: Of this rank's sequences, `[b, U, V]` (`[b, T, V]` of a decoder-only model), or the encoder's last
            hidden states `[b, T, D]` if the decoder did not run. Positions of padding hold no meaning. On CUDA they may
            still be under way.
        rows: Which of the batch's sequences they are.
        counted: Makes `stats`.
    """

    logits: Tensor
    rows: slice
    counted: Callable[[], BatchStats] = field(repr=False)

    @cached_property
    def stats(self) -> BatchStats:
        """What the batch took; where a CUDA device alone has counted, the first look waits for it."""
        return self.counted()


@torch.no_grad()  # not inference_mode: routers store tensors of a forward, which later calls could not use
def forward(model: Any, batch: ModelBatch) -> Tensor:
    """The output of a model, plain or with slots; see `BatchOutput.logits`."""
    ids, attention = to_device(batch.tokens.input_ids, model.device), to_device(batch.tokens.mask.long(), model.device)
    logits: Tensor
    if not model.config.is_encoder_decoder:
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits
    if batch.decoder is None:
        states: Tensor = model.encoder(input_ids=ids, attention_mask=attention)[0]
        return states
    decoder: dict[str, Tensor] = {"decoder_input_ids": to_device(batch.decoder.input_ids, model.device)}
    if _has_padding_in_front(batch.decoder.mask):  # later tokens would attend to it
        decoder["decoder_attention_mask"] = to_device(batch.decoder.mask.long(), model.device)
    logits = model(input_ids=ids, attention_mask=attention, **decoder).logits
    return logits


def _has_padding_in_front(mask: Tensor) -> bool:
    """Whether a real token follows padding in any sequence."""
    return bool((mask[:, 1:] & ~mask[:, :-1]).any())
