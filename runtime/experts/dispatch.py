"""TokenDispatch: some of a layer's tokens on their way to their slots and back.

Shape suffixes: T tokens of this rank, A rows that arrive, M rows computed, D model width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray
from runtime.distributed.ranks import Ranks


def choices(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorts tokens by the expert that computes them.

    Args:
        one_hot_TE: A one in the column of the expert; none where a token was dropped.
        needed_T: Which tokens must be computed; None means all.

    Returns:
        Tokens sorted by expert and then by position, int64; those that are left out come last, or not at all.
        Counts of the tokens that are computed and of all that were routed, int64 `[2, E]`, on the same device.
    """
    return (_on_host if one_hot_TE.is_cpu else _on_device)(one_hot_TE, needed_T)


def _on_device(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Nothing here waits for the device."""
    needed_TE = one_hot_TE if needed_T is None else one_hot_TE * needed_T.unsqueeze(1)
    expert_T = torch.where(needed_TE.any(-1), needed_TE.argmax(-1), one_hot_TE.shape[-1])
    return expert_T.argsort(stable=True), torch.stack([needed_TE.sum(0), one_hot_TE.sum(0)])


def _on_host(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """With few tokens calls are what takes time, and numpy's are the shorter ones."""
    rows_TE = one_hot_TE.numpy()
    tokens, experts = rows_TE.shape
    expert_T = rows_TE.argmax(-1)
    routed_T = rows_TE[np.arange(tokens), expert_T] > 0
    token = (routed_T if needed_T is None else routed_T & needed_T.numpy()).nonzero()[0]
    expert = expert_T[token]
    counts_2E = np.empty((2, experts), dtype=np.int64)
    counts_2E[:] = np.bincount(expert, minlength=experts)
    if needed_T is not None:
        counts_2E[1] = np.bincount(expert_T[routed_T], minlength=experts)
    return torch.from_numpy(token[expert.argsort(kind="stable")]), torch.from_numpy(counts_2E)


@dataclass(frozen=True)
class DispatchPlan:
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


def route(quota_SP: IntArray, start_P: IntArray, rank: int, slots: slice) -> DispatchPlan:
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
    return DispatchPlan(
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


class TokenDispatch:
    """Takes off when made; `rows` are to be computed, `land` sends the results back, `deliver` writes them out.

    Between these steps other work may be done: rows travel meanwhile.

    Args:
        hidden_TD: This rank's hidden states.
        token_T: Its tokens sorted by expert.
        route: Which of them go where.
        ranks: The ranks.
        crowded: Whether any rank sends another one anything on this route; all ranks must say the same.
    """

    def __init__(self, hidden_TD: Tensor, token_T: Tensor, route: DispatchPlan, ranks: Ranks, crowded: bool) -> None:
        self.route, self._ranks, self._crowded = route, ranks, crowded
        token = token_T.index_select(0, upload(route.pick, token_T.device))
        self._staying = token.narrow(0, 0, route.kept)
        self._leaving = token.narrow(0, route.kept, len(route.pick) - route.kept)
        self._arrived_AD = hidden_TD.new_empty((len(route.row), hidden_TD.shape[-1]))
        if crowded:
            self._sent = hidden_TD.index_select(0, self._leaving)
            from_others = self._arrived_AD.narrow(0, route.kept, len(route.row) - route.kept)
            self._work = ranks.all_to_all(self._sent, route.to, from_others, route.arriving)
        torch.index_select(hidden_TD, 0, self._staying, out=self._arrived_AD.narrow(0, 0, route.kept))

    def received(self) -> Tensor:
        """The rows to compute, place by place, `[M, D]`; waits for those that come from other ranks."""
        if self._crowded:
            self._work.wait()
        if self.route.straight:
            return self._arrived_AD
        order = np.empty_like(self.route.row)
        order[self.route.row] = np.arange(len(order))
        return self._arrived_AD.index_select(0, upload(order, self._arrived_AD.device))

    def send_back(self, result_MD: Tensor) -> None:
        """Sends results back to where their tokens came from."""
        route = self.route
        if not route.straight:
            result_MD = result_MD.index_select(0, upload(route.row, result_MD.device))
        self._done = result_MD.narrow(0, 0, route.kept)
        if self._crowded:
            self._returning = result_MD.narrow(0, route.kept, len(route.row) - route.kept)
            self._returned = torch.empty_like(self._sent)
            self._work = self._ranks.all_to_all(self._returning, route.arriving, self._returned, route.to)

    def combine(self, output_TD: Tensor, weight_T1: Tensor) -> None:
        """Writes results times their router weights to where the tokens are; waits for those from other ranks."""
        output_TD.index_copy_(0, self._staying, self._done * weight_T1.index_select(0, self._staying))
        if self._crowded:
            self._work.wait()
            output_TD.index_copy_(0, self._leaving, self._returned * weight_T1.index_select(0, self._leaving))


def upload(index: IntArray, device: torch.device) -> Tensor:
    """Positions on a device; from pinned memory where that lets the host go on."""
    tensor: Any = torch.from_numpy(index)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # type: ignore[no-any-return]
    return tensor  # type: ignore[no-any-return]
