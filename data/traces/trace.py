"""TokenBatch and RouterTrace: the tokens of one batch, the expert of every token, and the loads derived from them.

Shape suffixes: B sequences, T encoder positions, U decoder positions, L MoE layers (encoder first), E logical experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray
from data.models.layout import MoELayout

PADDING = -1


@dataclass(frozen=True)
class TokenBatch:
    """The encoder tokens of one batch, known before it runs.

    Attributes:
        input_ids: Token ids, int64 `[B, T]`.
        mask: True where a token is real, False where it is padding, bool `[B, T]`.
    """

    input_ids: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.mask.shape or self.input_ids.dim() != 2:
            raise ValueError(
                f"input_ids {tuple(self.input_ids.shape)} and mask {tuple(self.mask.shape)} must both be [B, T]"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {self.mask.dtype}, expected torch.bool")

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
            return cls(inputs.input_ids.cpu(), inputs.mask.cpu())
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
    def num_tokens(self) -> int:
        """Number of tokens in the batch; padding is not counted."""
        return int(self.mask.sum())


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
        tokens: Encoder tokens `[B, T]`.
        decoder_tokens: Decoder input tokens `[B, U]`; U is 0 if the decoder did not run.
        encoder_experts: Expert of each encoder token, int16 `[L_enc, B, T]`, `PADDING` on padding.
        decoder_experts: Expert of each decoder token, int16 `[L_dec, B, U]`, `PADDING` on padding.
        stepwise: Whether the decoder ran token by token; its capacity then never drops a token.
        encoder_top_experts: The K likeliest experts of each encoder token, likeliest first, int16 `[L_enc, B, T, K]`;
            None if they were not logged.
        encoder_top_probabilities: Router probabilities of these experts, float16 `[L_enc, B, T, K]`.
    """

    batch: int
    phase: str
    split: str
    segments: tuple[str, ...]
    tokens: TokenBatch
    decoder_tokens: TokenBatch
    encoder_experts: Tensor
    decoder_experts: Tensor
    stepwise: bool = False
    encoder_top_experts: Tensor | None = None
    encoder_top_probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        for name, experts, tokens in (
            ("encoder_experts", self.encoder_experts, self.tokens),
            ("decoder_experts", self.decoder_experts, self.decoder_tokens),
        ):
            if experts.shape[1:] != tokens.input_ids.shape:
                raise ValueError(
                    f"batch {self.batch}: {name} has shape {tuple(experts.shape)}, "
                    f"its tokens {tuple(tokens.input_ids.shape)}"
                )

    def demand(self, layout: MoELayout) -> IntArray:
        """Tokens whose router chose each expert, `[L, E]`; padding is not counted."""
        layers = [_count(ids, ids >= 0, layout) for ids in (*self.encoder_experts, *self.decoder_experts)]
        return torch.stack(layers).numpy()

    def load(self, layout: MoELayout) -> IntArray:
        """Dispatched tokens of each expert, `[L, E]`: demand minus the tokens dropped for capacity."""
        layers = [_count(ids, _kept(ids, layout), layout) for ids in self.encoder_experts]
        for ids in self.decoder_experts:
            layers.append(_count(ids, ids >= 0 if self.stepwise else _kept(ids, layout), layout))
        return torch.stack(layers).numpy()


def _kept(experts: Tensor, layout: MoELayout) -> Tensor:
    if layout.expert_capacity is None:
        return experts >= 0
    return dispatched_mask(experts, layout.num_experts, layout.expert_capacity)


def _count(experts: Tensor, keep: Tensor, layout: MoELayout) -> Tensor:
    """Tokens of each expert at the positions to keep, `[E]`."""
    return torch.bincount(experts[keep].long(), minlength=layout.num_experts)
