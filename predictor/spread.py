"""OnlineSpread: the standard deviation of forecast shares, learned from the forecasts' own recent errors. Numpy only.

The variance of a share is half of what this expert's error was of late, and half the sampling variance of the coming
tokens plus the disagreement of the forecasts that are combined. A factor for each layer then follows the coverage: it
rises while fewer than 80 % of the truths lie within the 80 % intervals, and falls while more do (adaptive conformal
inference, Gibbs and Candes 2021).

Shape suffixes: L MoE layers, E logical experts.
"""

import numpy as np

from data.arrays import BoolArray, FloatArray

NOMINAL, WIDTH = 0.8, 1.2816
"""Coverage that is aimed at, and the half width of that interval in standard deviations of a normal distribution."""
RECENT = 0.1
"""Weight of the newest squared error in an expert's running mean."""
GAIN = 0.6
"""Change of a layer's log factor for a coverage that is off by 1."""
MOST_LOG_FACTOR = 2.0
"""Largest size of that log factor."""
BIAS = 0.05
"""Squared error relative to the squared share, before any error was observed."""


class OnlineSpread:
    """Squared errors of each expert's share, and a factor for each layer.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        self.log_factor = np.zeros(num_layers)
        """Logarithm of the factor on the spread, `[L]`."""
        self.error: FloatArray | None = None
        """Running mean of the squared error of each share, `[L, E]`; None before the first batch."""

    def of(self, share_LE: FloatArray, tokens_L: FloatArray, disagreement_LE: FloatArray) -> FloatArray:
        """Spread of a forecast, `[L, E]`.

        Args:
            share_LE: Forecast shares.
            tokens_L: Assignments that the coming batch is expected to have.
            disagreement_LE: Variance of the forecasts that were combined.
        """
        sampling = share_LE * (1 - share_LE) / np.maximum(tokens_L, 1)[:, None]
        recent = sampling + BIAS * share_LE**2 if self.error is None else self.error
        variance = 0.5 * recent + 0.5 * (sampling + disagreement_LE)
        return np.asarray(np.sqrt(np.maximum(variance, 1e-9)) * np.exp(self.log_factor)[:, None])

    def observe(self, share_LE: FloatArray, spread_LE: FloatArray, truth_LE: FloatArray, carried_L: BoolArray) -> None:
        """Learns from a batch's forecast and its true shares, in the layers with load."""
        error = np.abs(share_LE - truth_LE)
        covered = (error <= WIDTH * spread_LE).mean(-1)
        moved = self.log_factor + GAIN * (NOMINAL - covered) * carried_L
        self.log_factor = np.clip(moved, -MOST_LOG_FACTOR, MOST_LOG_FACTOR)
        if self.error is None:
            self.error = 0.5 * spread_LE**2 + 0.5 * error**2
        self.error = np.where(carried_L[:, None], (1 - RECENT) * self.error + RECENT * error**2, self.error)
