"""Sparse attention: softmax replaced by sparsemax, so that most positions get a weight of exactly zero.

Source of the method: Martins and Astudillo, "From Softmax to Sparsemax" (ICML 2016), algorithm 1.
Shape suffixes: B sequences, T positions, H hidden width.
"""

import math

import torch
from torch import Tensor, nn


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the probability simplex nearest to the scores, over the last dimension; same shape."""
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
        lowest = torch.finfo(scores_BTT.dtype).min / x_BTH.shape[1]  # its sum over a row is still finite
        weights_BTT = sparsemax(scores_BTT.masked_fill(~mask_BT[:, None], lowest).float())
        attended: Tensor = weights_BTT @ value
        return attended
