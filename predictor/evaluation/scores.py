"""Scores: the metrics of one forecaster on one stream, batch by batch; their means and 95 % confidence intervals.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.arrays import FloatArray, IntArray
from data.traces.loads import share_of
from predictor.evaluation.bootstrap import resampled
from predictor.evaluation.metrics import hot_recall, load_tv, nll, sampling_floor
from predictor.evaluation.tables import REDUNDANT
from predictor.forecast import LoadForecast


@dataclass
class Scores:
    """The metrics of one forecaster on one stream.

    Attributes:
        load_tv: Total variation between predicted and true share, `[N][L]`.
        floor: `sampling_floor` of the true load, `[N][L]`.
        hot_recall: Share of the hot experts found, `[N][L]`.
        nll: Negative log-likelihood of a token's expert, nats, `[N][L]`.
        token_top1: Share of the tokens' experts that were predicted, `[N][L_in]`; empty for forecasters of loads alone.
        balancedness: Number of redundant experts -> balancedness, mean over layers, `[N]`.
        regret: Number of redundant experts -> balancedness with the oracle's forecast less `balancedness`, `[N]`.
        milliseconds: Duration of one forecast, `[N]`.
        share: Forecast shares, `[N][L, E]`.
        spread: Forecast standard deviations of the shares, `[N][L, E]`.
        true_share: True shares, `[N][L, E]`.
    """

    load_tv: list[FloatArray] = field(default_factory=list)
    floor: list[FloatArray] = field(default_factory=list)
    hot_recall: list[FloatArray] = field(default_factory=list)
    nll: list[FloatArray] = field(default_factory=list)
    token_top1: list[FloatArray] = field(default_factory=list)
    balancedness: dict[int, list[float]] = field(default_factory=dict)
    regret: dict[int, list[float]] = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)
    share: list[FloatArray] = field(default_factory=list)
    spread: list[FloatArray] = field(default_factory=list)
    true_share: list[FloatArray] = field(default_factory=list)

    def add(self, forecast: LoadForecast, load: IntArray, top_k: int) -> None:
        """Scores one forecast against the true load, `[L, E]`, of a model with K experts a token."""
        predicted, truth = torch.from_numpy(forecast.load).float(), torch.from_numpy(load).float()
        self.load_tv.append(load_tv(predicted, truth).numpy())
        self.floor.append(sampling_floor(truth, top_k).numpy())
        self.hot_recall.append(hot_recall(predicted, truth).numpy())
        self.nll.append(nll(predicted, truth).numpy())
        self.share.append(forecast.share.astype(np.float32))
        self.spread.append(forecast.spread.astype(np.float32))
        self.true_share.append(share_of(load).astype(np.float32))

    def coverage(self, nominal: FloatArray) -> FloatArray:
        """Share of experts whose true share lies in the forecast interval, for each nominal coverage (0 to 1)."""
        carried = np.isfinite(np.stack(self.load_tv))  # a layer without load has no true share
        error = np.abs(np.stack(self.share) - np.stack(self.true_share))[carried]
        width = torch.special.ndtri(torch.from_numpy((1 + nominal) / 2)).numpy()
        spread = np.stack(self.spread)[carried]
        return np.array([(error <= z * spread).mean() for z in width])

    def reported(self) -> dict[str, list[Any]]:
        """Values of each metric that is summarised, `[N]` or `[N][L]`; empty where the metric was not measured."""
        values: dict[str, list[Any]] = {
            "load_tv": self.load_tv, "hot_recall": self.hot_recall, "token_top1": self.token_top1
        }  # fmt: skip
        for metric, by_count in (("balancedness", self.balancedness), ("regret", self.regret)):
            values |= {f"{metric}_r{count}": by_count.get(count, []) for count in REDUNDANT}
        return values

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % interval of the mean of a metric in `reported`: a circular block bootstrap over batches."""
        values = np.array([np.nanmean(value) for value in self.reported()[metric]])
        low, high = np.quantile(values[resampled(len(values))].mean(1), [0.025, 0.975])
        return float(low), float(high)

    def gap_closed(self, last: "Scores", num_redundant_experts: int) -> tuple[float, tuple[float, float]]:
        """Share of the regret of `last` (persistence) that this forecaster avoids, and its 95 % interval."""
        own, its = np.array(self.regret[num_redundant_experts]), np.array(last.regret[num_redundant_experts])
        rows = resampled(len(own))
        its_mean = np.maximum(its[rows].mean(1), 1e-9)  # persistence may be perfect in a draw
        low, high = np.quantile(1 - own[rows].mean(1) / its_mean, [0.025, 0.975])
        return float(1 - own.mean() / max(its.mean(), 1e-9)), (float(low), float(high))

    def summary(self) -> dict[str, float | None]:
        """Means of the metrics in `reported` over the layers and batches with load, None for metrics not measured."""
        return {
            name: round(float(np.nanmean(values)), 4) if len(values) else None
            for name, values in self.reported().items()
        }

    def details(self) -> dict[str, Any]:
        """`summary` with intervals, and the values per layer, NLL, coverage and forecast time; None where no load was.

        `batches` is the number of batches that the means are over.
        """
        result: dict[str, Any] = dict(self.summary()) | {"batches": len(self.load_tv)}
        for name, values in self.reported().items():
            if len(values):
                result[f"{name}_interval"] = [round(value, 4) for value in self.interval(name)]
        result["load_tv_layers"], result["sampling_floor_layers"] = layer_means(self.load_tv), layer_means(self.floor)
        result["nll"] = round(float(np.nanmean(self.nll)), 4)
        result["milliseconds"] = round(float(np.median(self.milliseconds)), 2)
        if np.any(self.spread):
            result["coverage_80"] = round(float(self.coverage(np.array([0.8]))[0]), 4)
        return result


def layer_means(values: list[FloatArray]) -> list[float | None]:
    """Mean of each layer over the batches that have load in it, of values `[N][L]`; None where none has."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    sums, counts = np.where(known, stacked, 0).sum(0), known.sum(0)
    return [round(float(total / count), 4) if count else None for total, count in zip(sums, counts, strict=True)]
