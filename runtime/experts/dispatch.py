"""Token dispatch and combine: tokens travel to the ranks that hold their expert's slots, and the outputs come back.

    token_T, counts_2E = sort_by_expert(one_hot_TE, needed_T)
    quota_SP = split_by_quota(all ranks' counts, ...)
    plan = plan_dispatch(quota_SP, first_token_of_slots(quota_SP[rank], phy2log_P), rank, slots)
    dispatch = TokenDispatch(hidden_TD, token_T, plan, ranks)     # sends
    rows_MD = dispatch.received()                                 # rows sorted by slot, plan.slot_sizes of each
    dispatch.send_back(output_MD)
    dispatch.combine(output_TD, weight_T1)

An example with 2 ranks of 6 tokens each and 4 experts. Rank 0 holds the homes of experts 0 and 1 and an empty replica
slot, rank 1 holds the homes of 2 and 3 and a replica of 0: phy2log is [0, 1, -1 | 2, 3, 0].

                            rank 0                      rank 1
    expert of each token    [0, 2, 0, 0, 1, 0]          [0, 3, 0, 2, 0, 0]
    tokens by expert        [0, 2, 3, 5, 4, 1]          [0, 2, 4, 5, 3, 1]
    counts                  [4, 1, 1, 0]                [4, 0, 1, 1]
    quotas                  [4, 1, 0 | 1, 0, 0]         [1, 0, 0 | 1, 1, 3]
    first token of slot     [0, 4, - | 5, -, -]         [0, -, - | 4, 5, 1]
    positions               [0, 1, 2, 3, 4,  5]         [4, 5, 1, 2, 3,  0]
    num_local               5, sends 1, receives 1      5, sends 1, receives 1

Either rank computes six rows. Rank 1 sends one token of the hot expert 0 (its token 0) to slot 0 and receives rank 0's
token 1 for slot 3. A rank's own rows come first, so rank 0 holds tokens 0, 2, 3, 5 (slot 0) and 4 (slot 1), then the
row from rank 1, which belongs to slot 0: slot_order is [0, 1, 2, 3, 5, 4], and slot_sizes are [5, 1, 0].

Shape suffixes: T tokens of this rank, E experts, S ranks, P slots of all ranks, Q slots of this rank, M rows this rank
computes, D model width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.arrays import IntArray
from runtime.distributed.device import upload
from runtime.distributed.ranks import Ranks


def sort_by_expert(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorts tokens by expert, then by position, and counts them.

    Args:
        one_hot_TE: 1 in the column of the token's expert; a dropped token has an all-zero row.
        needed_T: Whether the token must be computed; None means all tokens.

    Returns:
        Indices of the tokens, int64. Tokens that are dropped or not needed come last on a device, and are left out on
        the CPU.
        Counts `[2, E]`, int64 on the same device: the tokens to compute, and all routed tokens.
    """
    return (_sort_on_host if one_hot_TE.is_cpu else _sort_on_device)(one_hot_TE, needed_T)


def _sort_on_device(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """No call in here waits for the device, so the number of left-out tokens stays unknown to the host."""
    needed_TE = one_hot_TE if needed_T is None else one_hot_TE * needed_T.unsqueeze(1)
    expert_T = torch.where(needed_TE.any(-1), needed_TE.argmax(-1), one_hot_TE.shape[-1])
    return expert_T.argsort(stable=True), torch.stack([needed_TE.sum(0), one_hot_TE.sum(0)])


def _sort_on_host(one_hot_TE: Tensor, needed_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """In numpy, because with few tokens the overhead of the calls dominates, and numpy's is smaller than torch's."""
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
    """Index arithmetic of one rank's dispatch, for all slots of a layer or for some of them.

    Attributes:
        positions: Positions among the rank's tokens sorted by expert: first the tokens it computes itself, by slot,
            then the tokens it sends, by slot.
        num_local: Number of tokens it computes itself.
        send_sizes: Rows sent to each rank, `[S]`; 0 for this rank.
        receive_sizes: Rows received from each rank, `[S]`; 0 for this rank.
        slot_order: For each row, own rows first and then received rows, its position among the rows sorted by slot,
            `[M]`.
        slot_sizes: Rows of each slot of this rank, `[Q]`; they sum to M.
        exchanged: Rows that all ranks together send to other ranks.
    """

    positions: IntArray
    num_local: int
    send_sizes: list[int]
    receive_sizes: list[int]
    slot_order: IntArray
    slot_sizes: IntArray
    exchanged: int

    @property
    def needs_exchange(self) -> bool:
        """Whether any rank sends a row; equal on all ranks, because it decides whether the collective is called."""
        return self.exchanged > 0

    @property
    def sorted_by_slot(self) -> bool:
        """Whether `slot_order` changes nothing: own rows are sorted by slot, received rows may interleave them."""
        return self.num_local == len(self.slot_order)


def plan_dispatch(quota_SP: IntArray, first_P: IntArray, rank: int, slots: slice) -> DispatchPlan:
    """Plans one rank's dispatch under the quotas of all ranks.

    Args:
        quota_SP: Tokens from each rank to each slot; 0 for slots that this dispatch leaves out.
        first_P: Position of each slot's first token among the rank's sorted tokens; see `first_token_of_slots`.
        rank: This rank.
        slots: Its slots.
    """
    world = len(quota_SP)
    away_P = quota_SP[rank].copy()
    away_P[slots] = 0
    local = _ranges(first_P[slots], quota_SP[rank, slots])
    incoming_SQ = quota_SP[:, slots]
    slot_sizes_Q = incoming_SQ.sum(0)
    # rows of a slot lie together; inside a slot, rank 0's rows come first
    start_SQ = slot_sizes_Q.cumsum() - slot_sizes_Q + incoming_SQ.cumsum(0) - incoming_SQ
    own_first = [rank, *(other for other in range(world) if other != rank)]
    receive_S = incoming_SQ.sum(1)
    receive_S[rank] = 0
    rows_SS = quota_SP.reshape(world, world, -1).sum(-1)
    return DispatchPlan(
        positions=np.concatenate([local, _ranges(first_P, away_P)]),
        num_local=len(local),
        send_sizes=away_P.reshape(world, -1).sum(1).tolist(),
        receive_sizes=receive_S.tolist(),
        slot_order=_ranges(start_SQ[own_first].ravel(), incoming_SQ[own_first].ravel()),
        slot_sizes=slot_sizes_Q,
        exchanged=int(rows_SS.sum() - rows_SS.trace()),
    )


def first_token_of_slots(quota_P: IntArray, phy2log_P: IntArray) -> IntArray:
    """Position of each slot's first token among a rank's tokens sorted by expert, `[P]`.

    An expert's tokens are divided among its slots in the order of the slots.
    """
    order = np.argsort(phy2log_P, kind="stable")
    first_P = np.empty_like(quota_P)
    first_P[order] = quota_P[order].cumsum() - quota_P[order]
    return first_P


def _ranges(first: IntArray, size: IntArray) -> IntArray:
    """Concatenated ranges: first [7, 2] and size [3, 2] give [7, 8, 9, 2, 3]."""
    total = int(size.sum())
    return np.arange(total) + np.repeat(first - (size.cumsum() - size), size)


class TokenDispatch:
    """One all-to-all of tokens and the one back; call `received`, `send_back` and `combine` in this order.

    The constructor starts sending. Other work may run between the calls, while rows travel.

    Args:
        hidden_TD: This rank's hidden states.
        token_T: Its tokens sorted by expert.
        plan: Rows that stay, leave and arrive.
        ranks: The ranks.
    """

    def __init__(self, hidden_TD: Tensor, token_T: Tensor, plan: DispatchPlan, ranks: Ranks) -> None:
        self.plan, self._ranks = plan, ranks
        token = token_T.index_select(0, upload(plan.positions, token_T.device))
        self._local = token.narrow(0, 0, plan.num_local)
        self._remote = token.narrow(0, plan.num_local, len(plan.positions) - plan.num_local)
        self._rows_MD = hidden_TD.new_empty((len(plan.slot_order), hidden_TD.shape[-1]))
        if plan.needs_exchange:
            self._sent = hidden_TD.index_select(0, self._remote)
            incoming = self._rows_MD.narrow(0, plan.num_local, len(plan.slot_order) - plan.num_local)
            self._work = ranks.all_to_all(self._sent, plan.send_sizes, incoming, plan.receive_sizes)
        torch.index_select(hidden_TD, 0, self._local, out=self._rows_MD.narrow(0, 0, plan.num_local))

    def received(self) -> Tensor:
        """Rows to compute, sorted by slot, `[M, D]`; waits for the rows of other ranks."""
        if self.plan.needs_exchange:
            self._work.wait()
        if self.plan.sorted_by_slot:
            return self._rows_MD
        order = np.empty_like(self.plan.slot_order)
        order[self.plan.slot_order] = np.arange(len(order))
        return self._rows_MD.index_select(0, upload(order, self._rows_MD.device))

    def send_back(self, output_MD: Tensor) -> None:
        """Starts sending the outputs of received rows back to their ranks."""
        plan = self.plan
        if not plan.sorted_by_slot:
            output_MD = output_MD.index_select(0, upload(plan.slot_order, output_MD.device))
        self._local_output = output_MD.narrow(0, 0, plan.num_local)
        if plan.needs_exchange:
            # kept as an attribute: the collective reads it until `combine` has waited
            self._outgoing = output_MD.narrow(0, plan.num_local, len(plan.slot_order) - plan.num_local)
            self._remote_output = torch.empty_like(self._sent)
            self._work = self._ranks.all_to_all(
                self._outgoing, plan.receive_sizes, self._remote_output, plan.send_sizes
            )

    def combine(self, output_TD: Tensor, weight_T1: Tensor) -> None:
        """Writes outputs times router weights to the tokens' rows; waits for the outputs of other ranks."""
        output_TD.index_copy_(0, self._local, self._local_output * weight_T1.index_select(0, self._local))
        if self.plan.needs_exchange:
            self._work.wait()
            output_TD.index_copy_(0, self._remote, self._remote_output * weight_T1.index_select(0, self._remote))
