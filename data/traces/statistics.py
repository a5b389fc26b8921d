"""TraceStatistics: how skewed the expert loads of a trace are, and how much they change from batch to batch.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.arrays import FloatArray, IntArray
from data.traces.loads import share_of, total_variation
from data.traces.store import StoredTrace


@dataclass(frozen=True)
class TraceStatistics:
    """Statistics of a trace; arrays have one entry per MoE layer.

    Attributes:
        loads: Dispatched tokens, `[N, L, E]`.
        tokens: Dispatched tokens, summed over batches.
        hottest: Load of the hottest expert divided by the mean load, median over the batches with load; NaN without.
        dropped: Fraction of demand that was dropped for capacity; None if only counts were logged.
        padding: Fraction of input positions that were padding; None if only counts were logged.
        step_tv: Total variation distance (0 to 1) between the shares of consecutive batches that both have load, mean
            over batches; NaN without any.
        floor_tv: `step_tv` if every batch were drawn from the same distribution: the part that sampling alone causes.
        phases: Phase of the stream that each batch belongs to; None if only counts were logged.
    """

    loads: IntArray
    tokens: IntArray
    hottest: FloatArray
    dropped: FloatArray | None
    padding: float | None
    step_tv: FloatArray
    floor_tv: FloatArray
    phases: tuple[str, ...] | None


def step_variation(loads: IntArray) -> FloatArray:
    """Total variation distance between the shares of each batch and of the batch before it, `[N - 1, L]`.

    NaN where one of the two has no load.
    """
    shares, carried = share_of(loads), loads.sum(-1) > 0
    return np.where(carried[1:] & carried[:-1], total_variation(shares[1:], shares[:-1]), np.nan)


def shuffled(loads: IntArray, rng: np.random.Generator) -> IntArray:
    """Distributes the same tokens over batches at random; each batch keeps its size, each expert its sum."""
    dealt = np.empty_like(loads)
    for layer in range(loads.shape[1]):
        left = loads[:, layer].sum(0)
        for step, size in enumerate(loads[:, layer].sum(-1)):
            dealt[step, layer] = rng.multivariate_hypergeometric(left, size)
            left = left - dealt[step, layer]
    return dealt


def measure(trace: StoredTrace) -> TraceStatistics:
    """Computes the statistics of a trace, reading it once."""
    demand, positions, real = None, 0, 0
    phases: list[str] = []
    if trace.about["granularity"] == "tokens":
        rows = []
        for batch in trace.traces():
            rows.append(batch.load(trace.layout))
            demand = batch.demand(trace.layout) + (0 if demand is None else demand)
            positions += batch.tokens.mask.numel()
            real += int(batch.tokens.mask.sum())
            phases.append(batch.phase)
        loads = np.stack(rows)
    else:
        loads = trace.loads()
    tokens = loads.sum((0, 2))
    wanted = None if demand is None else np.maximum(demand.sum(-1), 1)
    hottest = np.where(loads.sum(-1) > 0, share_of(loads).max(-1) * loads.shape[-1], np.nan)
    floor = step_variation(shuffled(loads, np.random.default_rng(0)))
    floor = floor * _of_different_experts(share_of(loads.sum(0)), trace.layout.experts_per_token)
    return TraceStatistics(
        loads=loads,
        tokens=tokens,
        hottest=_of_known(hottest, np.median),
        dropped=None if wanted is None else 1 - np.where(tokens > 0, tokens / wanted, 1),
        padding=None if demand is None else 1 - real / positions,
        step_tv=_of_known(step_variation(loads), np.mean),
        floor_tv=_of_known(floor, np.mean),
        phases=tuple(phases) or None,
    )


def _of_known(values_NL: FloatArray, statistic: Callable[[FloatArray], Any]) -> FloatArray:
    """A statistic of each layer over the batches with a value, `[L]`; NaN without any."""
    known = [layer[np.isfinite(layer)] for layer in values_NL.T]
    return np.array([float(statistic(layer)) if layer.size else np.nan for layer in known])


def _of_different_experts(share_LE: FloatArray, top_k: int) -> FloatArray:
    """How much less shares vary by sampling because the K experts of a token are different ones, `[L]`.

    Dealt one by one, an assignment goes to an expert with its share s and varies by s (1 - s); a token takes the expert
    with K s, and varies by K s (1 - K s).
    """
    alone = np.sqrt(share_LE * (1 - share_LE)).sum(-1)
    together = np.sqrt(share_LE * np.maximum(1 - top_k * share_LE, 0)).sum(-1)
    return np.asarray(np.divide(together, alone, out=np.ones_like(alone), where=alone > 0))
