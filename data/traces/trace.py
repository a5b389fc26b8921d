"""TokenBatch and RouterTrace: the tokens of one batch, the experts of every token, and the loads derived from them.

Shape suffixes: B sequences, T input positions, U decoder positions, K experts of a token, L MoE layers (those of the
input first), E logical experts. Input tokens are the encoder's, or the text of a decoder-only model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray
from data.models.layout import MoELayout

PADDING = -1
"""Expert of a position that was not routed: padding, or context."""
UNKNOWN = -1
"""Id of a token that is not written yet when a forecast is made."""
DECODE = "decode"
"""Phase of steps that compute the token written last; it is not known one step ahead."""


@dataclass(frozen=True)
class TokenBatch:
    """The input tokens of one batch, known before it runs.

    Attributes:
        input_ids: Token ids, int64 `[B, T]`; `UNKNOWN` for a token that the model has not written yet.
        mask: True where a token is real, False where it is padding, bool `[B, T]`.
        context: True for tokens that earlier batches computed, bool `[B, T]`: a forecaster reads them, this batch does
            not route them. None if the batch computes all its tokens.
        requests: Number of the request that each sequence belongs to, int64 `[B]`; None if unknown.
    """

    input_ids: Tensor
    mask: Tensor
    context: Tensor | None = None
    requests: Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.mask.shape or self.input_ids.dim() != 2:
            raise ValueError(
                f"input_ids {tuple(self.input_ids.shape)} and mask {tuple(self.mask.shape)} must both be [B, T]"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {self.mask.dtype}, expected torch.bool")
        if self.context is not None and (
            self.context.dtype != torch.bool
            or self.context.shape != self.mask.shape
            or bool((self.context & ~self.mask).any())
        ):
            raise ValueError(
                f"context is {self.context.dtype} {tuple(self.context.shape)}, expected torch.bool "
                f"{tuple(self.mask.shape)} and True on real tokens only"
            )
        if self.requests is not None and self.requests.shape != self.mask.shape[:1]:
            raise ValueError(
                f"requests have shape {tuple(self.requests.shape)}, expected one number for each of the "
                f"{len(self.mask)} sequences"
            )

    @classmethod
    def of(cls, inputs: Any) -> "TokenBatch":
        """Accepts a `TokenBatch` or what a Hugging Face tokenizer returns; the batch lies on the CPU.

        Args:
            inputs: A mapping with `input_ids` `[B, T]` or `[T]` and, where sequences are padded, `attention_mask` of
                the same shape: tensors, arrays or nested lists; or the ids alone as a tensor or array.

        Raises:
            TypeError: If `inputs` is none of these.
            ValueError: If ids and mask have different shapes, or sequences have different lengths.
        """
        if isinstance(inputs, cls):
            return inputs.to(torch.device("cpu"))
        if isinstance(inputs, Tensor | np.ndarray):
            inputs = {"input_ids": inputs}
        if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
            raise TypeError(
                f"got a {type(inputs).__name__}, expected what a tokenizer returns: a mapping with input_ids [B, T] "
                "and attention_mask [B, T], as of tokenizer(texts, padding=True, return_tensors='pt')"
            )
        ids = _as_tensor(inputs["input_ids"], "input_ids")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"input_ids have dtype {ids.dtype}, expected whole numbers")
        ids = ids.long()
        mask = inputs.get("attention_mask")
        if mask is None:
            return cls(ids, torch.ones_like(ids, dtype=torch.bool))
        mask = _as_tensor(mask, "attention_mask")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask holds other values than 0 and 1")
        return cls(ids, mask.bool())

    @property
    def computed(self) -> Tensor:
        """True for the tokens that this batch computes: neither padding nor context, bool `[B, T]`."""
        return self.mask if self.context is None else self.mask & ~self.context

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the batch computes; neither padding nor context is counted."""
        return int(self.computed.sum())

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenBatch":
        """Copies the batch to another device; `non_blocking` does not wait for copies from pinned memory."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        context, requests = (None if one is None else moved(one) for one in (self.context, self.requests))
        return TokenBatch(moved(self.input_ids), moved(self.mask), context, requests)

    def rows(self, rows: Tensor | slice, width: int | None = None) -> "TokenBatch":
        """Some of the sequences, and of them the first `width` positions."""
        context = None if self.context is None else self.context[rows, :width]
        requests = None if self.requests is None else self.requests[rows]
        return TokenBatch(self.input_ids[rows, :width], self.mask[rows, :width], context, requests)

    def unwritten(self) -> "TokenBatch":
        """The batch before its tokens are written: context stays, each token that it computes becomes `UNKNOWN`."""
        return replace(self, input_ids=self.input_ids.masked_fill(self.computed, UNKNOWN))


def _as_tensor(values: Any, name: str) -> Tensor:
    try:
        rows = torch.as_tensor(values).cpu()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a rectangle of numbers ({error}); tokenize with padding=True") from None
    return rows[None] if rows.dim() == 1 else rows


def pad_tokens(rows: list[IntArray], pad: int) -> TokenBatch:
    """Right-pads ragged token ids to one batch `[B, T]`."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return TokenBatch(ids, torch.arange(width) < lengths[:, None])


def dispatched_mask(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """True for routed tokens within their expert's capacity, bool `[..., T]`.

    An expert accepts the first `capacity` tokens of each sequence: with experts [2, 0, 2, 2] and capacity 2, the last
    token is dropped.

    Args:
        experts: Expert of each token, `[..., T]`; `PADDING` on padding, which must come last (right padding).
        num_experts: E.
        capacity: Tokens of one sequence that an expert accepts.
    """
    one_hot = torch.nn.functional.one_hot(experts.long() + 1, num_experts + 1)[..., 1:]
    rank = (one_hot.cumsum(-2) * one_hot).sum(-1)
    return (rank > 0) & (rank <= capacity)


@dataclass(frozen=True)
class RouterTrace:
    """One batch and the experts that its tokens were routed to.

    Attributes:
        batch: Number of the batch in the stream, from 0.
        phase: Part of the stream that the batch belongs to, such as "steady".
        split: "train", "gap", "val" or "test".
        segments: Segment (topic, language, source) of each sequence, `[B]`.
        tokens: Input tokens `[B, T]`.
        decoder_tokens: Decoder input tokens `[B, U]`; U is 0 if the decoder did not run, or there is no encoder.
        experts: Experts of each input token in the layers that route it, likeliest first, int16 `[L_in, B, T, K]`;
            `PADDING` on padding and context.
        decoder_experts: Experts of each decoder token, int16 `[L_dec, B, U, K]`, `PADDING` on padding.
        stepwise: Whether the decoder ran token by token; its capacity then never drops a token.
        top_experts: The likeliest experts of each input token, likeliest first, int16 `[L_in, B, T, top]`; None if they
            were not logged.
        top_probabilities: Router probabilities of these experts, float16 `[L_in, B, T, top]`.
    """

    batch: int
    phase: str
    split: str
    segments: tuple[str, ...]
    tokens: TokenBatch
    decoder_tokens: TokenBatch
    experts: Tensor
    decoder_experts: Tensor
    stepwise: bool = False
    top_experts: Tensor | None = None
    top_probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        for name, experts, tokens in (
            ("experts", self.experts, self.tokens),
            ("decoder_experts", self.decoder_experts, self.decoder_tokens),
        ):
            if experts.dim() != 4 or experts.shape[1:3] != tokens.input_ids.shape:
                raise ValueError(
                    f"batch {self.batch}: {name} has shape {tuple(experts.shape)}, expected [L, B, T, K] for tokens "
                    f"{tuple(tokens.input_ids.shape)}"
                )

    @property
    def requests(self) -> Tensor | None:
        """Number of the request that each sequence belongs to, int64 `[B]`; None if unknown."""
        return self.tokens.requests

    @property
    def upcoming(self) -> TokenBatch:
        """What is known of the input tokens one batch ahead: in phase `decode` not the token that is written last."""
        return self.tokens.unwritten() if self.phase == DECODE else self.tokens

    def demand(self, layout: MoELayout) -> IntArray:
        """Assignments of each expert, `[L, E]`: tokens whose router chose it; padding is not counted."""
        layers = [_count(ids, ids >= 0, layout) for ids in (*self.experts, *self.decoder_experts)]
        return torch.stack(layers).numpy()

    def load(self, layout: MoELayout) -> IntArray:
        """Dispatched assignments of each expert, `[L, E]`: demand minus those dropped for capacity."""
        layers = [_count(ids, _kept(ids, layout), layout) for ids in self.experts]
        for ids in self.decoder_experts:
            layers.append(_count(ids, ids >= 0 if self.stepwise else _kept(ids, layout), layout))
        return torch.stack(layers).numpy()


def _kept(experts: Tensor, layout: MoELayout) -> Tensor:
    """True for assignments `[B, T, K]` within the capacity, which a token's experts use in their order."""
    if layout.expert_capacity is None:
        return experts >= 0
    return dispatched_mask(experts.flatten(-2), layout.num_experts, layout.expert_capacity).view_as(experts)


def _count(experts: Tensor, keep: Tensor, layout: MoELayout) -> Tensor:
    """Assignments of each expert at the entries to keep, `[E]`."""
    return torch.bincount(experts[keep].long(), minlength=layout.num_experts)
