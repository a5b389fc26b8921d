"""ForecastMixture: several forecasts of a load as one, weighted in each layer by their recent errors. Numpy only.

The weights are those that would have had the least squared error over the last batches, older ones counting less, with
a pull towards given weights: online regression on the simplex. Errors that cancel out are thereby used, which weights
from each forecast's own error would miss.

Shape suffixes: C forecasts, L MoE layers, E logical experts.
"""

import numpy as np

from data.arrays import BoolArray, FloatArray

DISCOUNT = 0.9
"""Weight of a batch's errors, relative to those of the batch after it."""
PULL = 2.0
"""Strength of the pull towards the first weights, in batches on which the best forecast is alone."""
SWEEPS = 10
"""Gradient steps a batch; each begins at the weights of the batch before."""


class ForecastMixture:
    """Weights of C forecasts in each layer; they sum to 1 and none is negative.

    Args:
        num_layers: L.
        first: Weights before any batch was observed, `[C]`; they sum to 1.
    """

    def __init__(self, num_layers: int, first: FloatArray) -> None:
        self.first = np.tile(first, (num_layers, 1))
        self.weight = self.first.copy()
        """Present weights, `[L, C]`."""
        self.errors = np.zeros((num_layers, len(first), len(first)))
        """Discounted sum over batches of the products of two forecasts' errors, `[L, C, C]`."""

    def combine(self, shares_CLE: FloatArray) -> FloatArray:
        """The weighted mean of some shares, `[L, E]`."""
        return np.asarray(np.einsum("lc,cle->le", self.weight, shares_CLE))

    def disagreement(self, shares_CLE: FloatArray) -> FloatArray:
        """Weighted variance of the shares around their mean, `[L, E]`."""
        return np.asarray(np.einsum("lc,cle->le", self.weight, (shares_CLE - self.combine(shares_CLE)) ** 2))

    def observe(self, shares_CLE: FloatArray, truth_LE: FloatArray, carried_L: BoolArray) -> None:
        """Adapts the weights to a batch's errors in the layers with load; easy and hard batches count the same."""
        error_CLE = (shares_CLE - truth_LE) * carried_L[:, None]
        products = np.einsum("cle,dle->lcd", error_CLE, error_CLE)
        best = np.diagonal(products, axis1=1, axis2=2).min(-1)
        self.errors = DISCOUNT * self.errors + products / np.maximum(best, 1e-12)[:, None, None]
        self.weight = self._fitted()

    def _fitted(self) -> FloatArray:
        """Minimises w' errors w + PULL |w - first|^2 on the simplex by accelerated projected gradients."""
        curved = self.errors + PULL * np.eye(self.first.shape[1])
        step = 1 / np.trace(curved, axis1=1, axis2=2)[:, None]
        weight = ahead = self.weight
        momentum = 1.0
        for _ in range(SWEEPS):
            slope = (curved @ ahead[..., None])[..., 0] - PULL * self.first
            new, after = on_simplex(ahead - step * slope), (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / after * (new - weight)
            weight, momentum = new, after
        return weight


def on_simplex(point_LC: FloatArray) -> FloatArray:
    """The nearest rows that sum to 1 without negative entries: [.8, .6, -1] becomes [.6, .4, 0]."""
    falling = -np.sort(-point_LC, axis=-1)
    excess = (falling.cumsum(-1) - 1) / np.arange(1, point_LC.shape[-1] + 1)
    last = (falling > excess).sum(-1, keepdims=True) - 1
    return np.asarray(np.maximum(point_LC - np.take_along_axis(excess, last, -1), 0))
