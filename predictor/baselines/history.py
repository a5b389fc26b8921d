"""Forecasters that cost next to nothing: what a learned predictor has to beat.

All of them follow `predictor.forecast.Forecaster` and need numpy alone, so the runtime can fall back on them.
Shape suffixes: K past batches, N training batches, L MoE layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data.arrays import FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load

if TYPE_CHECKING:  # history needs no torch
    from data.traces.trace import TokenBatch

SPREAD_STEPS = 8
"""Steps back that tell persistence how far one batch is from the next."""
EMA_RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Rates tried on validation batches."""


@dataclass(frozen=True)
class Uniform:
    """Every expert gets the same."""

    num_layers: int
    num_experts: int
    name: str = "uniform"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`; without history no tokens are expected."""
        tokens = history[-1].sum(-1) if len(history) else np.zeros(self.num_layers)
        load = np.repeat(tokens[:, None] / self.num_experts, self.num_experts, axis=1)
        return forecast_from_load(load, made_at=len(history), source=self.name)


@dataclass(frozen=True)
class Stationary:
    """The mean load `[L, E]` of the training batches, whatever comes."""

    load: FloatArray
    name: str = "stationary"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`."""
        return forecast_from_load(self.load, made_at=len(history), source=self.name)


@dataclass(frozen=True)
class LastBatch:
    """Persistence: the coming batch is taken to load the experts as the last one did."""

    name: str = "last"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`; history must hold at least one batch."""
        steps = share_of(history[-SPREAD_STEPS - 1 :])
        spread = _deviation(steps[1:], steps[:-1], np.ones(len(steps) - 1)) if len(steps) > 1 else steps[-1]
        return forecast_from_load(history[-1].astype(np.float64), made_at=len(history), source=self.name, spread=spread)


@dataclass(frozen=True)
class RunningMean:
    """The mean load of every batch so far."""

    name: str = "mean"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`; history must hold at least one batch."""
        return _average(history, np.ones(len(history)), self.name)


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of loads: weight `rate` on the last batch, `rate * (1 - rate)` on the one before..."""

    rate: float = 0.3
    name: str = "ema"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`; history must hold at least one batch."""
        age = np.arange(len(history))[::-1].astype(np.float64)
        return _average(history, (1 - self.rate) ** age, self.name)

    @classmethod
    def fit(cls, loads: IntArray, steps: list[int]) -> Ema:
        """The rate with the least total variation on the given steps of loads `[N, L, E]`; step 0 has no past."""

        def error(rate: float) -> float:
            distances = [
                np.abs(cls(rate).forecast(None, loads[:step]).share - share_of(loads[step])).sum()
                for step in steps
                if step > 0
            ]
            return float(np.mean(distances))

        return cls(min(EMA_RATES, key=error))


@dataclass(frozen=True)
class Oracle:
    """The control arm: told the true loads `[N, L, E]`, it must score perfectly wherever the measuring is right."""

    loads: IntArray
    name: str = "oracle"

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        """See `Forecaster`; the length of the history tells which batch comes."""
        return forecast_from_load(self.loads[len(history)].astype(np.float64), made_at=len(history), source=self.name)


def share_of(load: IntArray) -> FloatArray:
    """Loads `[..., E]` divided by their sum over experts; where there is no load, uniform."""
    total = load.sum(-1, keepdims=True)
    uniform = np.full(load.shape, 1.0 / load.shape[-1])
    share: FloatArray = np.divide(load, total, out=uniform, where=total > 0)
    return share


def _average(history: LoadHistory, weight: FloatArray, source: str) -> LoadForecast:
    """The weighted mean of past loads; its spread is how far they lie from it, and all of a share after one batch."""
    mean = np.tensordot(weight / weight.sum(), history, axes=1)
    forecast = forecast_from_load(mean, made_at=len(history), source=source)
    spread = _deviation(share_of(history), forecast.share, weight) if len(history) > 1 else forecast.share
    return replace(forecast, spread=spread)


def _deviation(share: FloatArray, centre: FloatArray, weight: FloatArray) -> FloatArray:
    """Root of the weighted mean square of `share - centre` `[K, L, E]` over K: `[L, E]`."""
    deviation: FloatArray = np.sqrt(np.tensordot(weight / weight.sum(), (share - centre) ** 2, axes=1))
    return deviation
