"""What past loads say about the coming one: a learned mix of moving averages for each MoE layer.

Shape suffixes: K past batches, R rates, L MoE layers, E experts.
"""

import torch
from torch import Tensor, nn

RATES = (1.0, 0.5, 0.2, 0.08, 0.03)
"""Weight of the last batch in each moving average; 1 is the last batch alone."""
WINDOW = 64
"""Batches looked back at."""


def moving_averages(history_KLE: Tensor) -> Tensor:
    """Exponential moving averages of load shares, `[R, L, E]`; no load and no history count as uniform."""
    if not len(history_KLE):
        return history_KLE.new_full((len(RATES), *history_KLE.shape[1:]), 1 / history_KLE.shape[-1])
    total = history_KLE.sum(-1, keepdim=True)
    share = torch.where(total > 0, history_KLE / total.clamp(min=1), 1 / history_KLE.shape[-1])
    age = torch.arange(len(share) - 1, -1, -1, device=share.device)
    weight_RK = torch.stack([(1 - rate) ** age for rate in RATES])  # 0 ** 0 is 1: rate 1 keeps the last batch alone
    return torch.einsum("rk,kle->rle", weight_RK / weight_RK.sum(-1, keepdim=True), share)


class HistoryMix(nn.Module):
    """A forecast from history alone, and its blend with the forecast from tokens.

    Args:
        num_layers: L.
        blends: Whether history has a say where tokens are known.
    """

    def __init__(self, num_layers: int, blends: bool) -> None:
        super().__init__()
        self.rate_logits = nn.Parameter(torch.zeros(num_layers, len(RATES)))
        self.trust_logits = nn.Parameter(torch.full((num_layers,), -2.0)) if blends else None

    def share(self, history_KLE: Tensor) -> Tensor:
        """Forecast share of each expert from the last `WINDOW` loads, `[L, E]`."""
        return torch.einsum("lr,rle->le", self.rate_logits.softmax(-1), moving_averages(history_KLE[-WINDOW:]))

    def blend(self, load_LE: Tensor, history_KLE: Tensor) -> Tensor:
        """Pulls a load forecast from tokens towards history, by a learned weight for each layer; its sums stay."""
        if self.trust_logits is None:
            return load_LE
        trust = self.trust_logits.sigmoid()[:, None] * (len(history_KLE) > 0)
        return torch.lerp(load_LE, self.share(history_KLE) * load_LE.sum(-1, keepdim=True), trust)
