"""Layers of the network: SRU or LSTM stack, sparsemax attention, moving averages of past loads. Plain torch.

`Recurrent` stacks `SRULayer`s (or torch's LSTM). `SparseAttention` weights positions by `sparsemax` (Martins and
Astudillo, ICML 2016), which sets most weights to exactly 0. `HistoryMix` forecasts from past loads.

Shape suffixes: B sequences, T positions, H hidden width, K past batches, R moving averages, L MoE layers, E experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from predictor.recurrence import SRULayer

RATES = (1.0, 0.5, 0.2, 0.08, 0.03)
"""Weight of the last batch in each moving average; 1 is the last batch alone."""
WINDOW = 64
"""Most past batches that a forecast uses."""


class Recurrent(nn.Module):
    """A stack of recurrent layers, `[B, T, H]` to `[B, T, H]`; padding does not affect the real tokens.

    Args:
        cell: "sru" or "lstm".
        width: H.
        depth: Number of layers.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, cell: str, width: int, depth: int, bidirectional: bool) -> None:
        super().__init__()
        self.layers: nn.ModuleList | None = None
        if cell == "sru":
            self.layers = nn.ModuleList(SRULayer(width, bidirectional) for _ in range(depth))
        else:
            half = width // 2 if bidirectional else width
            self.stack = nn.LSTM(width, half, depth, batch_first=True, bidirectional=bidirectional)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Runs all layers; the output at padded positions is undefined."""
        if self.layers is not None:
            x_TBH, mask_TB = x_BTH.transpose(0, 1), mask_BT.T
            for layer in self.layers:
                x_TBH = layer(x_TBH, mask_TB)
            return x_TBH.transpose(0, 1)
        packed = pack_padded_sequence(x_BTH, mask_BT.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        output: Tensor = pad_packed_sequence(self.stack(packed)[0], batch_first=True, total_length=x_BTH.shape[1])[0]
        return output


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the probability simplex nearest to the scores, over the last dimension; same shape.

    Scores (0.1, 1.1, 0.2) give (0, 0.95, 0.05): all scores are lowered by 0.15, and negative values become 0.
    """
    ordered = scores.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    support = (rank * ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (scores - threshold).clamp(min=0)


class SparseAttention(nn.Module):
    """Single-head self-attention with sparsemax weights over the real tokens of each sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Maps `[B, T, H]` to `[B, T, H]`."""
        query, key, value = self.query_key_value(x_BTH).chunk(3, -1)
        scores_BTT = query @ key.transpose(1, 2) / math.sqrt(x_BTH.shape[-1])
        lowest = torch.finfo(scores_BTT.dtype).min / x_BTH.shape[1]  # the sum of a row of these is still finite
        weights_BTT = sparsemax(scores_BTT.masked_fill(~mask_BT[:, None], lowest).float())
        attended: Tensor = weights_BTT @ value
        return attended


def moving_averages(history_KLE: Tensor) -> Tensor:
    """Exponential moving averages of load shares, one for each of `RATES`, `[R, L, E]`.

    The shares of a layer without load, and of an empty history, count as uniform.
    """
    if not len(history_KLE):
        return history_KLE.new_full((len(RATES), *history_KLE.shape[1:]), 1 / history_KLE.shape[-1])
    total = history_KLE.sum(-1, keepdim=True)
    share = torch.where(total > 0, history_KLE / total.clamp(min=1), 1 / history_KLE.shape[-1])
    age = torch.arange(len(share) - 1, -1, -1, device=share.device)
    weight_RK = torch.stack([(1 - rate) ** age for rate in RATES])  # 0 ** 0 is 1: rate 1 keeps the last batch alone
    return torch.einsum("rk,kle->rle", weight_RK / weight_RK.sum(-1, keepdim=True), share)


class HistoryMix(nn.Module):
    """A forecast from past loads, and its blend with the forecast from tokens.

    Args:
        num_layers: L.
        blends: Whether past loads are blended into the forecast from tokens.
    """

    def __init__(self, num_layers: int, blends: bool) -> None:
        super().__init__()
        self.rate_logits = nn.Parameter(torch.zeros(num_layers, len(RATES)))
        self.trust_logits = nn.Parameter(torch.full((num_layers,), -2.0)) if blends else None

    def share(self, history_KLE: Tensor) -> Tensor:
        """Forecast share of each expert from the last `WINDOW` loads, `[L, E]`."""
        return torch.einsum("lr,rle->le", self.rate_logits.softmax(-1), moving_averages(history_KLE[-WINDOW:]))

    def blend(self, load_LE: Tensor, history_KLE: Tensor) -> Tensor:
        """Moves a load forecast from tokens towards history, by a learned weight per layer; layer sums are kept."""
        if self.trust_logits is None:
            return load_LE
        trust = self.trust_logits.sigmoid()[:, None] * (len(history_KLE) > 0)
        return torch.lerp(load_LE, self.share(history_KLE) * load_LE.sum(-1, keepdim=True), trust)
