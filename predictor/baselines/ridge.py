"""RidgeForecaster: linear regression from past loads to the coming load, without tokens. Needs scikit-learn.

Shape suffixes: K past batches, F features, L MoE layers, E logical experts.
"""

import numpy as np
from sklearn.linear_model import Ridge

from data.arrays import FloatArray, IntArray
from data.traces.loads import share_of
from data.traces.trace import TokenBatch
from predictor.baselines.history import at_least_one
from predictor.forecast import LoadForecast, LoadHistory, forecast_from_load

LAGS = 4
"""Number of last batches whose shares are features, one each."""
LONG = 32
"""Batches in the mean that is a further feature."""


class RidgeForecaster:
    """In each layer, the coming share of an expert is linear in its last shares, their mean and its training mean.

    Args:
        loads: Loads of all batches of the trace, `[N, L, E]`.
        steps: Training batches among them.
        strength: Ridge penalty, for shares multiplied by the number of experts.
    """

    name = "ridge"

    def __init__(self, loads: IntArray, steps: list[int], strength: float = 1.0) -> None:
        self.mean = np.stack([share_of(loads[step]) for step in steps]).mean(0)
        known = [step for step in steps if step > 0]
        features = np.stack([self._features(loads[:step]) for step in known])  # [N, L, E, F]
        targets = np.stack([share_of(loads[step]) for step in known])
        scale = loads.shape[-1]
        self.models = [
            Ridge(alpha=strength).fit(
                scale * features[:, layer].reshape(-1, features.shape[-1]), scale * targets[:, layer].reshape(-1)
            )
            for layer in range(loads.shape[1])
        ]

    def _features(self, history: LoadHistory) -> FloatArray:
        """Features `[L, E, F]`; if the history is shorter than the lags, its first batch is repeated."""
        shares = np.stack([share_of(load) for load in history[-LONG:]])
        lags = [shares[max(len(shares) - lag, 0)] for lag in range(1, LAGS + 1)]
        return np.stack([*lags, shares.mean(0), self.mean], axis=-1)

    def forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast:
        history = at_least_one(history, self.name)
        features = self._features(history)
        scale = features.shape[1]
        share = np.stack([model.predict(scale * row) / scale for model, row in zip(self.models, features, strict=True)])
        load = share.clip(min=0) * history[-1].sum(-1, keepdims=True)
        return forecast_from_load(load, made_at=len(history), source=self.name)
