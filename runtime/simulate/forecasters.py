"""Forecasters of the simulator, opened by name; two of them need what only a replay knows.

Shape suffixes: L MoE layers, E logical experts.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.arrays import IntArray
from data.traces.load_stream import LoadStream
from data.traces.loads import share_of
from predictor.baselines.history import at_least_one
from predictor.baselines.own_past import OwnPast
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, Loads, forecast_from_load
from runtime.balancing.balancer import FORECASTERS

if TYPE_CHECKING:  # it imports torch
    from data.traces.trace import TokenBatch

TRUTHS = ("oracle", "exact")
"""Forecasts that know the load, which no deployment can have in time."""
TRAINED = ("learned", "adaptive")
"""Forecasts that need a predictor."""
FORECASTS = (*FORECASTERS, "own", *TRAINED, *TRUTHS)
FROM_TOKENS = (*TRAINED, "own")
"""Forecasts that read tokens or requests, which counts alone do not have."""


class TrueLoad:
    """The true load as forecast: the upper bound.

    Args:
        name: "oracle", or "exact" where the plan is made only once the load is known.

    Attributes:
        load: The coming step's load `[L, E]`, which the replay sets before it asks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.load: IntArray = np.zeros((0, 0), dtype=np.int64)

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        return forecast_from_load(self.load.astype(np.float64), made_at=len(history), source=self.name)


class MeanSoFar:
    """The mean load of all batches observed so far, from sums; like `RunningMean` on a history that is kept whole."""

    name = "mean"

    def __init__(self) -> None:
        self._batches = 0
        self._load = self._share = self._squared = np.zeros((1, 1))

    def forecast(self, upcoming: "TokenBatch | None", history: LoadHistory) -> LoadForecast:
        at_least_one(history, self.name)
        forecast = forecast_from_load(self._load / self._batches, made_at=self._batches, source=self.name)
        if self._batches == 1:
            return replace(forecast, spread=forecast.share)
        mean, centre = self._share / self._batches, forecast.share
        variance = self._squared / self._batches - 2 * centre * mean + centre**2
        return replace(forecast, spread=np.sqrt(np.maximum(variance, 0)))

    def observe(self, upcoming: "TokenBatch | None", load: LoadHistory, sequences: Loads | None = None) -> None:
        """Adds a batch's load `[L, E]` to the sums."""
        share = share_of(load)
        self._load, self._share, self._squared = self._load + load, self._share + share, self._squared + share**2
        self._batches += 1


def usual_forecasts(stream: LoadStream, with_predictor: bool) -> list[str]:
    """All forecasts that can be made for the recording, without "exact"."""
    left_out = {"exact"} | (set(TRAINED) if not with_predictor else set())
    left_out |= set() if stream.served else {"own"}
    return [name for name in FORECASTS if name not in left_out]


def open_forecaster(name: str, predictor: Path | None, stream: LoadStream, start: int) -> Forecaster:
    """The forecaster of that name, for steps from `start` on.

    Raises:
        ValueError: If a trained forecast is asked for without a predictor or `own` without requests, or the predictor
            does not fit the loads.
    """
    if name == MeanSoFar.name:
        mean = MeanSoFar()
        for step in islice(stream.steps(), start):
            mean.observe(None, step.load)
        return mean
    if name in FORECASTERS:
        return FORECASTERS[name]
    if name in TRUTHS:
        return TrueLoad(name)
    if name == "own":
        if not stream.served or stream.layout is None:
            raise ValueError("forecast own needs requests: give a trace that names them, and --serve prefill or decode")
        return OwnPast(stream.layout.experts_per_token)
    if predictor is None:
        raise ValueError(f"forecast {name} needs a predictor: give a folder that train.py wrote (--predictor)")
    from predictor.checkpoint import load_adaptive, load_predictor  # nothing else here needs the network's modules

    trained = (load_predictor if name == "learned" else load_adaptive)(predictor, stream.layout)
    recorded = stream.num_layers, stream.num_experts
    if recorded != trained.shape:
        raise ValueError(f"{predictor} forecasts {trained.shape} layers and experts, the loads have {recorded}")
    return trained
