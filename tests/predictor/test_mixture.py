"""What an adaptive forecast is made of: the mixture of forecasts, and the spread of its errors."""

import numpy as np
import pytest

from predictor.mixture import ForecastMixture, on_simplex
from predictor.spread import OnlineSpread


def test_the_mixture_uses_errors_that_cancel_out():
    mixture = ForecastMixture(1, np.array([1.0, 0.0, 0.0]))
    truth = np.array([[0.5, 0.3, 0.2]])
    shares = truth + np.array([[[0.03, -0.03, 0.0]], [[0.05, -0.05, 0]], [[-0.05, 0.05, 0.0]]])
    for _ in range(60):
        mixture.observe(shares, truth, np.array([True]))
    assert np.abs(mixture.combine(shares) - truth).max() < 0.01
    assert mixture.weight.sum() == pytest.approx(1)
    assert (mixture.disagreement(shares) > 0).any()


def test_projection_on_the_simplex():
    assert np.allclose(on_simplex(np.array([[0.8, 0.6, -1.0]])), [[0.6, 0.4, 0.0]])
    rows = on_simplex(np.random.default_rng(0).standard_normal((50, 5)))
    assert np.allclose(rows.sum(-1), 1)
    assert (rows >= 0).all()


def test_the_spread_follows_the_coverage():
    spread, share, carried = OnlineSpread(1), np.full((1, 4), 0.25), np.array([True])
    first = spread.of(share, np.array([100.0]), np.zeros((1, 4)))
    for _ in range(20):
        spread.observe(share, spread.of(share, np.array([100.0]), np.zeros((1, 4))), share + 0.2, carried)
    assert (spread.of(share, np.array([100.0]), np.zeros((1, 4))) > 2 * first).all()
