"""Forecasters that are wrong, broken or ill-behaved."""

import numpy as np

from predictor.forecast import LoadForecast, forecast_from_load


class Noise:
    """A forecaster that is always wrong, in another way each time."""

    name = "noise"

    def __init__(self, layout):
        self.shape, self.rng = (layout.num_layers, layout.num_experts), np.random.default_rng(0)

    def forecast(self, upcoming, history):
        return forecast_from_load(self.rng.exponential(10.0, self.shape) ** 2, made_at=len(history), source=self.name)


class Broken:
    name = "broken"

    def __init__(self, how):
        self.how = how

    def forecast(self, upcoming, history):
        if self.how == "raises":
            raise RuntimeError("no forecast today")
        if self.how == "exits":
            raise SystemExit(3)
        shape = (7, 3) if self.how == "other layout" else history.shape[1:]
        share = np.full(shape, np.nan if self.how == "nan" else 1 / shape[1])
        return LoadForecast(share, np.ones(shape[0]), np.zeros(shape), len(history), self.name)


class Scribbler(Noise):
    """A forecaster that writes to what it is given."""

    def forecast(self, upcoming, history):
        upcoming.input_ids.fill_(7)
        upcoming.mask.fill_(False)
        history.fill(0)
        return super().forecast(upcoming, history)
