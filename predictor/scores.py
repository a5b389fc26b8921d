"""How one forecaster did on one stream, batch by batch.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from data.trace import IntArray
from predictor.baselines import share_of
from predictor.forecast import FloatArray, LoadForecast
from predictor.metrics import hot_recall, load_tv


@dataclass
class Scores:
    """One forecaster on one stream, batch by batch.

    Attributes:
        load_tv: Total variation of predicted and true share, `[N][L]`.
        hot_recall: Share of the hot experts found, `[N][L]`.
        token_top1: Share of tokens whose expert was named, `[N][L_enc]`; empty where tokens are not forecast.
        balancedness: Mean over layers, `[N]`; empty where there was no balancer.
        milliseconds: Time of one forecast, `[N]`.
        share: Forecast shares, `[N][L, E]`.
        spread: One standard deviation of each, `[N][L, E]`.
        true_share: What came, `[N][L, E]`.
    """

    load_tv: list[FloatArray] = field(default_factory=list)
    hot_recall: list[FloatArray] = field(default_factory=list)
    token_top1: list[FloatArray] = field(default_factory=list)
    balancedness: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    share: list[FloatArray] = field(default_factory=list)
    spread: list[FloatArray] = field(default_factory=list)
    true_share: list[FloatArray] = field(default_factory=list)

    def add(self, forecast: LoadForecast, load: IntArray) -> None:
        """Scores one forecast against the load that came, `[L, E]`."""
        predicted, truth = torch.from_numpy(forecast.load).float(), torch.from_numpy(load).float()
        self.load_tv.append(load_tv(predicted, truth).numpy())
        self.hot_recall.append(hot_recall(predicted, truth).numpy())
        self.share.append(forecast.share.astype(np.float32))
        self.spread.append(forecast.spread.astype(np.float32))
        self.true_share.append(share_of(load).astype(np.float32))

    def coverage(self, nominal: FloatArray) -> FloatArray:
        """Share of experts whose true share lies in the interval of each nominal coverage; same shape as `nominal`."""
        error = np.abs(np.stack(self.share) - np.stack(self.true_share))
        width = torch.special.ndtri(torch.from_numpy((1 + nominal) / 2)).numpy()
        spread = np.stack(self.spread)
        return np.array([(error <= z * spread).mean() for z in width])

    def summary(self) -> dict[str, float | None]:
        """The figures of the contract: means over layers and batches."""
        values = {name: getattr(self, name) for name in ("load_tv", "hot_recall", "token_top1", "balancedness")}
        return {name: round(float(np.nanmean(value)), 4) if len(value) else None for name, value in values.items()}
