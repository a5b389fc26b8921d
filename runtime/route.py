"""Route: which of its tokens a rank sends where, and in which rows it computes what reaches it. Integers only.

Rows reach a rank in this order: its own, by slot, then those of the other ranks, each by slot. They are computed place
by place, and within a place in the order of the ranks, which is the order of the sequences in the batch.

Shape suffixes: S ranks, P slots of the plan, Q slots of this rank, N places of this rank.
"""

from dataclasses import dataclass

import numpy as np

from runtime.plan import IntArray


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
    """

    pick: IntArray
    kept: int
    to: list[int]
    arriving: list[int]
    row: IntArray

    @property
    def straight(self) -> bool:
        """Whether rows are computed just as they arrive."""
        return self.kept == len(self.row)


def route(quota_SP: IntArray, start_P: IntArray, rank: int, slots: slice) -> Route:
    """The route of one rank under the quotas of some slots.

    Args:
        quota_SP: Tokens from each rank to each slot on the route.
        start_P: Where the slot's tokens begin among the rank's own, sorted by expert: see `starts`.
        rank: Which rank this is.
        slots: Its slots in the plan.
    """
    ranks = [rank, *(other for other in range(len(quota_SP)) if other != rank)]
    away_P = quota_SP[rank].copy()
    away_P[slots] = 0
    kept = runs(start_P[slots], quota_SP[rank, slots])
    arriving_SQ = quota_SP[:, slots]
    size_Q = arriving_SQ.sum(0)
    first_SQ = size_Q.cumsum() - size_Q + arriving_SQ.cumsum(0) - arriving_SQ
    arriving = arriving_SQ.sum(1)
    arriving[rank] = 0
    return Route(
        pick=np.concatenate([kept, runs(start_P, away_P)]),
        kept=len(kept),
        to=away_P.reshape(len(quota_SP), -1).sum(1).tolist(),
        arriving=arriving.tolist(),
        row=runs(first_SQ[ranks].ravel(), arriving_SQ[ranks].ravel()),
    )


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
