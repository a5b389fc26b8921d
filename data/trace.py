"""What one batch looks like to a forecaster, what the routers did with it, and the loads that follow from that.

Shape suffixes: B sequences, T encoder positions, U decoder positions, L MoE layers (encoder first), E logical experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.layout import MoELayout

IntArray = npt.NDArray[np.int64]
PADDING = -1


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one batch, known before it runs.

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

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch, padding left out."""
        return int(self.mask.sum())


def pad_tokens(rows: list[IntArray], pad: int) -> TokenBatch:
    """Right-pads ragged token ids to one batch `[B, T]`."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return TokenBatch(ids, torch.arange(width) < lengths[:, None])


def dispatched_mask(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which routed tokens fit into their expert's capacity, which counts per sequence and in order of position.

    Args:
        experts: Expert of each token, `[..., T]`; `PADDING` on padding, which must come last (right padding).
        num_experts: E.
        capacity: Tokens of one sequence an expert accepts.
    """
    one_hot = torch.nn.functional.one_hot(experts.long() + 1, num_experts + 1)[..., 1:]
    rank = (one_hot.cumsum(-2) * one_hot).sum(-1)
    return (rank > 0) & (rank <= capacity)


@dataclass(frozen=True)
class RouterTrace:
    """One batch and where its tokens were routed.

    Attributes:
        batch: Number of the batch in the stream.
        phase: Which traffic it belongs to.
        split: "train", "gap", "val" or "test".
        segments: Segment (topic, language, source) of each sequence, `[B]`.
        tokens: Encoder tokens `[B, T]`.
        decoder_tokens: Decoder input tokens `[B, U]`; U is 0 where the decoder did not run.
        encoder_experts: Expert of each encoder token, int16 `[L_enc, B, T]`, `PADDING` on padding.
        decoder_experts: Expert of each decoder token, int16 `[L_dec, B, U]`, `PADDING` on padding.
    """

    batch: int
    phase: str
    split: str
    segments: tuple[str, ...]
    tokens: TokenBatch
    decoder_tokens: TokenBatch
    encoder_experts: Tensor
    decoder_experts: Tensor

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

    def _counts(self, num_experts: int, capacity: int | None) -> IntArray:
        rows = []
        for experts in (*self.encoder_experts, *self.decoder_experts):
            keep = experts >= 0 if capacity is None else dispatched_mask(experts, num_experts, capacity)
            rows.append(torch.bincount(experts[keep].long(), minlength=num_experts))
        return torch.stack(rows).numpy()

    def demand(self, layout: MoELayout) -> IntArray:
        """Tokens whose router chose each expert, padding left out, `[L, E]`."""
        return self._counts(layout.num_experts, None)

    def load(self, layout: MoELayout) -> IntArray:
        """Dispatched tokens of each expert: demand less the tokens dropped for capacity, `[L, E]`."""
        return self._counts(layout.num_experts, layout.expert_capacity)
