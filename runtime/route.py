"""Route: which of its tokens a rank sends where, and in which rows it computes what reaches it. Integers only.

Rows reach a rank in this order: its own, by slot, then those of the other ranks, each by slot. They are computed place
by place, and within a place in the order of the ranks, which is the order of the sequences in the batch.

Shape suffixes: S ranks, E experts, P slots of the plan, Q slots of this rank, N places of this rank.
"""

from dataclasses import dataclass

import numpy as np

from runtime.plan import IntArray

ALIKE = 16
"""Rows from which on matrix kernels add up a row in the same order whatever their number (seen on CPUs with MKL).

Below it, groups that lost padding or were split are filled up to what the plain model multiplies at once, as far as
that is known: padding that was not computed may be routed elsewhere later on. Without it, last bits differ more often.
"""


@dataclass(frozen=True)
class Route:
    """One rank's way through a layer, or through some of its slots.

    Attributes:
        pick: Of the rank's tokens sorted by expert, the ones on this route: those it computes itself, by slot, then
            those for the other ranks, by slot.
        kept: How many of them it computes itself.
        to: Rows sent to each rank, `[S]`; none to itself.
        arriving: Rows received from each rank, `[S]`; none from itself.
        row: The row each one is computed in, in order of arrival.
        filled: For each row the arrival it is filled from; rows that fill a small group up repeat the first one.
        rows: Rows of each place, `[N]`.
    """

    pick: IntArray
    kept: int
    to: list[int]
    arriving: list[int]
    row: IntArray
    filled: IntArray
    rows: IntArray

    @property
    def straight(self) -> bool:
        """Whether rows are computed just as they arrive."""
        return len(self.filled) == len(self.row) and self.kept == len(self.row)


def route(
    quota_SP: IntArray, start_P: IntArray, routed_P: IntArray, rank: int, slots: slice, places_Q: IntArray, places: int
) -> Route:
    """The route of one rank under the quotas of some slots.

    Args:
        quota_SP: Tokens from each rank to each slot on the route.
        start_P: Where the slot's tokens begin among the rank's own, sorted by expert: see `starts`.
        routed_P: Rows that the plain model would multiply with the slot's expert, padding counted.
        rank: Which rank this is.
        slots: Its slots in the plan.
        places_Q: The place in force of each of its slots.
        places: N.
    """
    ranks = [rank, *(other for other in range(len(quota_SP)) if other != rank)]
    per_rank = quota_SP.shape[1] // len(quota_SP)
    mine_P = quota_SP[rank].copy()
    away_P = mine_P.copy()
    away_P[slots], mine_P[: slots.start], mine_P[slots.stop :] = 0, 0, 0
    pick = np.concatenate([runs(start_P, mine_P), runs(start_P, away_P)])
    arriving_SQ = quota_SP[:, slots]
    size_Q = arriving_SQ.sum(0)
    size_N, rows_N = np.zeros((2, places), dtype=np.int64)
    size_N[places_Q] = size_Q
    rows_N[places_Q] = np.maximum(size_Q, np.minimum(routed_P[slots], ALIKE)) * (size_Q > 0)
    first_Q = (rows_N.cumsum() - rows_N)[places_Q]
    first_SQ = first_Q + arriving_SQ.cumsum(0) - arriving_SQ
    row = runs(first_SQ[ranks].ravel(), arriving_SQ[ranks].ravel())
    filled = np.zeros(int(rows_N.sum()), dtype=np.int64)
    filled[row] = np.arange(len(row))
    arriving = arriving_SQ.sum(1)
    arriving[rank] = 0
    to = away_P.reshape(len(quota_SP), per_rank).sum(1)
    return Route(pick, int(mine_P.sum()), to.tolist(), arriving.tolist(), row, filled, rows_N)


def starts(quota_P: IntArray, phy2log_P: IntArray) -> IntArray:
    """Where each slot's tokens begin among a rank's own, sorted by expert, `[P]`; an expert's slots take turns."""
    order = np.argsort(phy2log_P, kind="stable")
    first_P = np.empty_like(quota_P)
    first_P[order] = quota_P[order].cumsum() - quota_P[order]
    return first_P


def runs(first: IntArray, size: IntArray) -> IntArray:
    """first[0], first[0] + 1, ... (size[0] of them), then the same for the next."""
    total = int(size.sum())
    return np.arange(total) + np.repeat(first - (size.cumsum() - size), size)
