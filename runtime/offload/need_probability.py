"""NeedProbability: the probability that an expert is needed, from its forecast load and its frequency of use.

Plans are made at every layer, between two layers of the model, so what they are made of is compiled and written out as
loops: on small arrays numpy's calls take ten times as long.

Shape suffixes: L MoE layers, E logical experts, K features.
"""

from math import exp, log

import numpy as np
from numba import njit

from data.arrays import FloatArray

FLOOR = 0.02
"""Tokens added to a load before its logarithm; also the least distance of a frequency (0 to 1) from 0 and 1."""


class NeedProbability:
    """Probability that at least one token reaches an expert, from its forecast load and its frequency of use.

    A logistic regression for each MoE layer on the logarithms of the load and of the frequency's odds, updated after
    every batch.

    Args:
        num_layers: L.
        first: Weights at the start: `BY_LOAD` or `BY_FREQUENCY`.
    """

    BY_LOAD = (0.0, 1.0, 0.0)
    """Of the intercept, the load and the frequency: odds equal to the forecast load. 4 tokens give odds of about 4 to
    1, probability .8; for small loads that is close to a Poisson distribution."""
    BY_FREQUENCY = (0.0, 0.0, 1.0)
    """The frequency of use, or whatever probability is given in its place."""
    PRIOR_VARIANCE = 0.5
    """Variance of each regression weight at the start."""
    RETENTION = 0.9
    """Share (0 to 1) of the accumulated evidence that is kept from one batch to the next; older batches fade."""

    def __init__(self, num_layers: int, first: tuple[float, float, float] = BY_LOAD) -> None:
        self._weight_LK = np.tile(np.array(first), (num_layers, 1))
        self._precision_LKK = np.tile(np.eye(len(first)) / self.PRIOR_VARIANCE, (num_layers, 1, 1))

    def probability(self, load_LE: FloatArray, frequency_LE: FloatArray) -> FloatArray:
        """Probability of each expert, `[L, E]`.

        Args:
            load_LE: Forecast load in tokens, `[L, E]`.
            frequency_LE: Frequency with which past batches needed the expert (0 to 1), `[L, E]`.
        """
        return _probability(load_LE, frequency_LE, self._weight_LK)

    def observe(self, layer: int, load_E: FloatArray, frequency_E: FloatArray, needed_E: FloatArray) -> None:
        """Updates one layer's regression by a Newton step.

        Args:
            layer: The layer that ran.
            load_E: Its forecast load in tokens, `[E]`.
            frequency_E: Frequencies before this batch, `[E]`: those from which the probability was computed.
            needed_E: 1 for experts that were needed, else 0, `[E]`.
        """
        precision_KK = self._precision_LKK[layer]
        precision_KK *= self.RETENTION
        precision_KK += (1 - self.RETENTION) * np.eye(len(precision_KK)) / self.PRIOR_VARIANCE
        gradient_K = _evidence(load_E, frequency_E, needed_E, self._weight_LK[layer], precision_KK)
        self._weight_LK[layer] += np.linalg.solve(precision_KK, gradient_K)


@njit(cache=True, nogil=True)
def _log_odds(frequency: float) -> float:
    frequency = min(max(frequency, FLOOR), 1 - FLOOR)
    return log(frequency / (1 - frequency))


@njit(cache=True, nogil=True)
def _sigmoid(log_odds: float) -> float:
    """Probability of log odds, kept within .0025 of 0 and 1 so that no observation has unbounded weight."""
    return 1 / (1 + exp(-min(max(log_odds, -6.0), 6.0)))


@njit(cache=True, nogil=True)
def _probability(load_LE: FloatArray, frequency_LE: FloatArray, weight_LK: FloatArray) -> FloatArray:
    """See `NeedProbability.probability`; nan where the load is."""
    probability_LE = np.full(load_LE.shape, np.nan)
    for layer in range(load_LE.shape[0]):
        for expert in range(load_LE.shape[1]):
            load = load_LE[layer, expert]
            if not np.isnan(load):
                log_odds = weight_LK[layer, 0] + weight_LK[layer, 1] * log(load + FLOOR)
                log_odds += weight_LK[layer, 2] * _log_odds(frequency_LE[layer, expert])
                probability_LE[layer, expert] = _sigmoid(log_odds)
    return probability_LE


@njit(cache=True, nogil=True)
def _evidence(
    load_E: FloatArray, frequency_E: FloatArray, needed_E: FloatArray, weight_K: FloatArray, precision_KK: FloatArray
) -> FloatArray:
    """The gradient of the log likelihood `[K]`; adds the experts' curvature to the precision."""
    gradient_K, x_K = np.zeros(3), np.ones(3)
    for expert in range(len(load_E)):
        x_K[1], x_K[2] = log(load_E[expert] + FLOOR), _log_odds(frequency_E[expert])
        error = needed_E[expert] - _sigmoid(weight_K[0] + weight_K[1] * x_K[1] + weight_K[2] * x_K[2])
        for i in range(3):
            gradient_K[i] += x_K[i] * error
            for j in range(3):
                precision_KK[i, j] += x_K[i] * x_K[j] / 4
    return gradient_K
