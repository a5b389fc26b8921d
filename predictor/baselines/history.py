"""Baselines that forecast from past loads: last batch, moving average, running mean; uniform, stationary and oracle.

All of them follow `predictor.forecast.Forecaster` and need numpy only, so the runtime can fall back on them.

    from predictor import Ema

    forecast = Ema(rate=0.3).forecast(None, history=past_loads)  # past loads int64 [K, L, E], oldest first

Shape suffixes: K past batches, N training batches, L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data.arrays import FloatArray, IntArray
from data.traces.loads import share_of
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, NoHistoryError, forecast_from_load

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

SPREAD_STEPS = 8
"""Most recent differences between consecutive batches from which `LastBatch` estimates its spread."""
EMA_RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Rates that `Ema.fit` tries."""


@dataclass(frozen=True)
class Uniform:
    """The same share for every expert; the tokens of the last batch, or none without a past batch."""

    num_layers: int
    num_experts: int
    name: str = "uniform"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        tokens = history[-1].sum(-1) if len(history) else np.zeros(self.num_layers)
        load = np.repeat(tokens[:, None] / self.num_experts, self.num_experts, axis=1)
        return forecast_from_load(load, made_at=len(history), source=self.name)


@dataclass(frozen=True)
class Stationary:
    """The mean load `[L, E]` of the training batches, for every batch."""

    load: FloatArray
    name: str = "stationary"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        return forecast_from_load(self.load, made_at=len(history), source=self.name)


@dataclass(frozen=True)
class LastBatch:
    """Persistence: the load of the last batch is the forecast of the next."""

    name: str = "last"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        history = at_least_one(history, self.name)
        steps = share_of(history[-SPREAD_STEPS - 1 :])
        spread = _deviation(steps[1:], steps[:-1], np.ones(len(steps) - 1)) if len(steps) > 1 else steps[-1]
        return forecast_from_load(history[-1].astype(np.float64), made_at=len(history), source=self.name, spread=spread)


@dataclass(frozen=True)
class RunningMean:
    """The mean load of all past batches."""

    name: str = "mean"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        history = at_least_one(history, self.name)
        return _average(history, np.ones(len(history)), self.name)


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of loads.

    The last batch has weight `rate`, the batch before it `rate * (1 - rate)`, and so on, scaled to a sum of 1.
    """

    rate: float = 0.3
    name: str = "ema"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        history = at_least_one(history, self.name)
        return _average(history, falling_weights(len(history), self.rate), self.name)

    @classmethod
    def fit(cls, loads: IntArray, steps: list[int]) -> Ema:
        """Picks the rate with the least total variation on some steps of loads `[N, L, E]`; step 0 has no past."""

        def error(rate: float) -> float:
            distances = [
                np.abs(cls(rate).forecast(None, loads[:step]).share - share_of(loads[step])).sum()
                for step in steps
                if step > 0
            ]
            return float(np.mean(distances))

        return cls(min(EMA_RATES, key=error))


FREE: dict[str, Forecaster] = {"last": LastBatch(), "ema": Ema()}
"""Forecasters from past loads that a trained predictor is compared with before it serves."""


@dataclass(frozen=True)
class Oracle:
    """The true loads `[N, L, E]` as forecasts: the upper bound, and a check that each metric is perfect for them.

    The length of the history is the number of the coming batch.
    """

    loads: IntArray
    name: str = "oracle"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        return forecast_from_load(self.loads[len(history)].astype(np.float64), made_at=len(history), source=self.name)


def at_least_one(history: LoadHistory | None, source: str) -> LoadHistory:
    """The history, refused if it holds no batch."""
    if history is None or not len(history):
        raise NoHistoryError(
            f"forecaster '{source}' needs the load of at least one past batch, got none; run a batch first, or use a "
            "trained predictor"
        )
    return history


def falling_weights(size: int, rate: float) -> FloatArray:
    """Weights of past batches, oldest first, `[size]`; each is `1 - rate` times the weight of the batch after it."""
    weights: FloatArray = (1 - rate) ** np.arange(size, dtype=np.float64)[::-1]
    return weights


def _average(history: LoadHistory, weight: FloatArray, source: str) -> LoadForecast:
    """Weighted mean of past loads; its spread is their deviation from it, or the whole share after one batch."""
    mean = np.tensordot(weight / weight.sum(), history, axes=1)
    forecast = forecast_from_load(mean, made_at=len(history), source=source)
    spread = _deviation(share_of(history), forecast.share, weight) if len(history) > 1 else forecast.share
    return replace(forecast, spread=spread)


def _deviation(share: FloatArray, centre: FloatArray, weight: FloatArray) -> FloatArray:
    """Weighted root mean square of `share - centre` `[K, L, E]` over the K batches, `[L, E]`."""
    deviation: FloatArray = np.sqrt(np.tensordot(weight / weight.sum(), (share - centre) ** 2, axes=1))
    return deviation
