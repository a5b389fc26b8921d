"""Load scenarios for the planner: samples around the forecast, scaled to its spread and shaped like recent changes.

Experts that are hot together in one batch tend to be hot together in the next. The forecast's errors are therefore
given the shape in which the last loads varied, and the size of the forecast's own spread. Further scenarios put some
tokens on random experts, as a change of topic does. A forecast with zero spread yields a single scenario.

Shape suffixes: K recent loads, S scenarios, L MoE layers, E logical experts.
"""

from functools import lru_cache

import numpy as np

from data.arrays import Float32Array, FloatArray
from predictor.forecast import LoadForecast, LoadHistory

RECENT = 8
"""Recent loads whose deviations from their mean shape the errors."""
DECAY = 0.8
"""Weight of a recent load, relative to the load after it."""
SURPRISES = 8
"""Number of scenarios with tokens on random experts."""
SURPRISE_WEIGHT = 0.2
"""Weight of these scenarios together; all scenarios weigh 1."""
SURPRISE_SHARE = 0.3
"""Largest share of a layer's tokens that such a scenario puts on random experts; less where the spread is small."""


def scenarios(forecast: LoadForecast, recent: LoadHistory) -> tuple[Float32Array, Float32Array]:
    """Shares of the load that the plan should suit.

    Args:
        forecast: Share and spread `[L, E]`.
        recent: Loads of the last batches, oldest first, `[K, L, E]`; K may be 0.

    Returns:
        Shares `[L, E, S]`; every `[L, :, S]` sums to 1. Their weights `[S]`, which sum to 1.
    """
    share = forecast.share.astype(np.float32)
    if not forecast.spread.any():
        return share[..., None], np.ones(1, dtype=np.float32)
    errors, weight = _errors(forecast, recent[-RECENT:])
    near = np.maximum(share + errors, 0)
    total = near.sum(-1, keepdims=True)  # 0 where a silent layer's errors take all of it
    near = np.divide(near, total, out=np.broadcast_to(share, near.shape).copy(), where=total > 0)
    far = _surprises(share, forecast.spread)
    weights = np.concatenate([weight * (1 - SURPRISE_WEIGHT), np.full(len(far), SURPRISE_WEIGHT / len(far))])
    return np.ascontiguousarray(np.moveaxis(np.concatenate([near, far]), 0, -1)), weights.astype(np.float32)


def _errors(forecast: LoadForecast, recent: LoadHistory) -> tuple[Float32Array, Float32Array]:
    """Errors of the spread's size in the shape of the last loads' deviations, `[K, L, E]`, and weights `[K]`."""
    weight = (DECAY ** np.arange(len(recent))[::-1]).astype(np.float32)
    if len(recent) < 2:
        return np.zeros((1, *forecast.share.shape), dtype=np.float32), np.ones(1, dtype=np.float32)
    weight /= weight.sum()
    loads = recent.astype(np.float32)
    shares = loads / np.maximum(loads.sum(-1, keepdims=True), 1)
    deviation = shares - np.tensordot(weight, shares, axes=1)
    variance = np.tensordot(weight, (deviation**2).sum(-1), axes=1)
    size = np.sqrt((forecast.spread**2).sum(-1) / np.maximum(variance, 1e-12)).astype(np.float32)
    return deviation * size[:, None], weight


def _surprises(share: Float32Array, spread: FloatArray) -> Float32Array:
    """The forecast with some tokens put on random experts, the same experts at every step, `[S, L, E]`."""
    part = np.minimum(SURPRISE_SHARE, 1.5 * spread.sum(-1)).astype(np.float32)[:, None]
    return np.asarray((1 - part) * share + part * _random_shares(share.shape))


@lru_cache(maxsize=4)
def _random_shares(shape: tuple[int, ...]) -> Float32Array:
    """Random shares, `[S, L, E]`."""
    share: Float32Array = np.exp(np.random.default_rng(0).standard_normal((SURPRISES, *shape), dtype=np.float32))
    share /= share.sum(-1, keepdims=True)
    return share
