"""Metrics of one forecast against the true load, one value per MoE layer: total variation, recall, NLL, top-1.

Shape suffixes: L MoE layers, E logical experts.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

HOT = 16
"""Number of experts that count as hot: the redundant experts of the default setting."""


def shares(load_LE: Tensor) -> Tensor:
    """Load divided by its sum over experts; uniform in a layer without load."""
    total = load_LE.sum(-1, keepdim=True)
    return torch.where(total > 0, load_LE / total.clamp(min=1e-9), 1 / load_LE.shape[-1])


def load_tv(predicted_LE: Tensor, load_LE: Tensor) -> Tensor:
    """Total variation distance (0 to 1) between predicted and true share, `[L]`; NaN in a layer without load.

    Shares (0.5, 0.5) and (0.75, 0.25) are 0.25 apart: a quarter of the tokens was expected at another expert.
    """
    distance = 0.5 * (shares(predicted_LE) - shares(load_LE)).abs().sum(-1)
    return torch.where(load_LE.sum(-1) > 0, distance, torch.nan)


def hot_recall(predicted_LE: Tensor, load_LE: Tensor, hot: int = HOT) -> Tensor:
    """Share of the `hot` most loaded experts that are among the `hot` highest forecasts, `[L]`.

    Experts with as much load as the least hot expert count as hot too. NaN as in `load_tv`.
    """
    hot = min(hot, load_LE.shape[-1])
    chosen = torch.zeros_like(load_LE).scatter(-1, predicted_LE.topk(hot).indices, 1.0)
    threshold = load_LE.topk(hot).values[:, -1:]
    found = (chosen * (load_LE >= threshold)).sum(-1)
    return torch.where(load_LE.sum(-1) > 0, found / hot, torch.nan)


def nll(predicted_LE: Tensor, load_LE: Tensor) -> Tensor:
    """Negative log-likelihood of a dispatched token's expert under the forecast share, in nats, `[L]`.

    A share of 0.001 is spread over all experts, so that the result is finite. NaN as in `load_tv`.
    """
    guess = 0.999 * shares(predicted_LE) + 0.001 / load_LE.shape[-1]
    return torch.where(load_LE.sum(-1) > 0, -(shares(load_LE) * guess.log()).sum(-1), torch.nan)


def sampling_floor(load_LE: Tensor, top_k: int) -> Tensor:
    """Expected total variation of a forecast of the true shares, if tokens draw their experts from them, `[L]`.

    Half the mean absolute deviation of binomial counts (normal approximation), summed over experts; a token takes an
    expert with `top_k` times its share, because its K experts are different ones. A forecaster that reads the tokens
    can be below it; a forecaster that knows only average shares cannot. NaN as in `load_tv`.
    """
    assignments = load_LE.sum(-1, keepdim=True)
    share = shares(load_LE)
    spread = share * (1 - top_k * share).clamp(min=0) / assignments.clamp(min=1)
    floor = (spread * (2 / torch.pi)).sqrt().sum(-1) / 2
    return torch.where(assignments[..., 0] > 0, floor, torch.nan)


def token_top1(chosen: Tensor, experts: Tensor) -> Tensor:
    """Share of the experts of real tokens that were predicted, `[L_in]`; with K of 1 the share of tokens.

    Args:
        chosen: The K predicted experts of each token, `[L_in, B, T, K]`.
        experts: Its K true experts, negative on padding, `[L_in, B, T, K]`.
    """
    real = experts >= 0
    found = (experts[..., None] == chosen[..., None, :]).any(-1)
    return (found & real).sum((1, 2, 3)) / real.sum((1, 2, 3)).clamp(min=1)


def likeliest(logits_BTLE: Tensor, top_k: int) -> Tensor:
    """The `top_k` experts with the highest logits of each token, `[L_in, B, T, K]`."""
    if top_k == 1:
        return logits_BTLE.argmax(-1, keepdim=True).permute(2, 0, 1, 3)
    return logits_BTLE.topk(top_k, -1).indices.permute(2, 0, 1, 3)


class LayerMean(Metric):
    """Running mean of a value per layer, `[L]`; NaN values are skipped."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value_L: Tensor) -> None:
        """Adds one batch."""
        known = value_L.isfinite()
        self.total += torch.where(known, value_L, 0.0)
        self.count += known

    def compute(self) -> Tensor:
        """Mean of each layer, `[L]`; NaN without values."""
        return self.total / self.count
