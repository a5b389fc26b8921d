"""Calibration: how often an expert whose load was forecast is needed at all, learned while running.

A forecast says tokens; what counts for a cache is whether there is at least one. In each layer a logistic regression
on the forecast load and on how often the expert is needed by and large follows what comes, by one step a batch. Steps
are Newton's with the curvature's upper bound, 1/4, in its place, so that none goes too far (Boehning and Lindsay, 1988,
"Monotonicity of quadratic-approximation algorithms"). A forecaster that is wrong loses its say to what is usual.

Shape suffixes: L MoE layers, E logical experts, K features.
"""

import numpy as np

from runtime.schedule import FloatArray


class Calibration:
    """Probability that an expert is needed, by its forecast load, its layer, and how often it is needed.

    Begins with odds equal to the forecast load, which is near the Poisson distribution's as long as loads are small.
    """

    BEGIN = (0.0, 1.0, 0.0)  # weights of: nothing, the load's logarithm, the usual odds' logarithm
    DOUBT = 0.5  # variance of each of these weights
    MEMORY = 0.9  # of what was learned from one batch to the next
    LEAST = 0.02  # tokens, and probability, below which nothing is told apart

    def __init__(self, num_layers: int) -> None:
        self._weight_LK = np.tile(np.array(self.BEGIN), (num_layers, 1))
        self._precision_LKK = np.tile(np.eye(len(self.BEGIN)) / self.DOUBT, (num_layers, 1, 1))

    def probability(self, load_LE: FloatArray, usual_LE: FloatArray) -> FloatArray:
        """Of each expert, `[L, E]`, from its forecast load and the share of past batches that needed it."""
        return _chance((self._features(load_LE, usual_LE) * self._weight_LK[:, None]).sum(-1))

    def observe(self, layer: int, load_E: FloatArray, usual_E: FloatArray, needed_E: FloatArray) -> None:
        """What became of one layer's forecast; `usual_E` as it was when the probability was asked for."""
        x_EK, weight_K = self._features(load_E, usual_E), self._weight_LK[layer]
        precision_KK = self._precision_LKK[layer]
        precision_KK *= self.MEMORY
        precision_KK += (1 - self.MEMORY) / self.DOUBT * np.eye(len(weight_K)) + x_EK.T @ x_EK / 4
        weight_K += np.linalg.solve(precision_KK, x_EK.T @ (needed_E - _chance(x_EK @ weight_K)))

    def _features(self, load: FloatArray, usual: FloatArray) -> FloatArray:
        usual = np.clip(usual, self.LEAST, 1 - self.LEAST)
        return np.stack([np.ones_like(load), np.log(load + self.LEAST), np.log(usual / (1 - usual))], -1)


def _chance(log_odds: FloatArray) -> FloatArray:
    """Never quite sure."""
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -6, 6))))
