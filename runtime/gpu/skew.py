"""Loads like those of the tables' skewed rows: a power law over experts, and the most loaded rank of a group.

The tables say how skewed the loads of a row were, not which they were. Drawing from the same law, many times, gives
what the timed rank had on average. aiconfigurator's `collector/helper.py` describes the law.

Shape suffixes: E experts, G ranks.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from data.arrays import FloatArray, IntArray

DRAWS = 16
POWER = 1.2
"""Exponent of the law in the rows that `KernelTimes` is checked against."""


class RankLoads(NamedTuple):
    """Loads of the most loaded rank in each draw: assignments and active experts, `[DRAWS]` both."""

    assignments: FloatArray
    active: FloatArray


@cache
def most_loaded(tokens: int, num_experts: int, top_k: int, ranks: int, power: float = POWER) -> RankLoads:
    """What the most loaded rank has, in `DRAWS` draws from a fixed seed."""
    rng = np.random.default_rng([tokens, num_experts, top_k, ranks])
    draws = [power_law(rng, tokens, num_experts, top_k, power).reshape(ranks, -1) for _ in range(DRAWS)]
    hot = [load_GE[load_GE.sum(-1).argmax()] for load_GE in draws]
    return RankLoads(np.array([float(load.sum()) for load in hot]), np.array([float((load > 0).sum()) for load in hot]))


def power_law(rng: np.random.Generator, tokens: int, num_experts: int, top_k: int, power: float) -> IntArray:
    """Loads of one draw, `[E]`: their sum is tokens x top_k, and no expert has more than all tokens."""
    wanted = tokens * top_k
    low, high = (1.0, 0.8 * tokens) if wanted > num_experts else (0.01, 2.0)
    ends = low ** (1 - power), high ** (1 - power)
    share = (ends[0] + (ends[1] - ends[0]) * rng.random(num_experts)) ** (1 / (1 - power))
    load = np.minimum(np.rint(share / share.sum() * wanted).astype(np.int64), tokens)
    while missing := wanted - int(load.sum()):
        open_experts = np.flatnonzero(load < tokens if missing > 0 else load > 0)
        order = open_experts[np.argsort(np.sign(missing) * load[open_experts], kind="stable")]
        load[order[: abs(missing)]] += np.sign(missing)
    return np.asarray(load)
