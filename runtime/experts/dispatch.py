"""Token dispatch and combine: tokens travel to the ranks that hold their expert's slots, and the outputs come back.

    assignment_A, counts_2E = sort_on_host(choice, skipped_T, E)
    quota_SP = split_by_quota(all ranks' counts, ...)
    index, parts = plan_dispatch(quota_SP, phy2log_P, rank, windows, ...)
    index = upload(index, device)                                                 # one copy for a layer's indices
    dispatch = TokenDispatch(hidden_TD, assignment_A, K, index, parts[0], ranks)  # sends
    rows_MD = dispatch.received()                                                 # rows sorted by slot
    dispatch.send_back(output_MD)
    dispatch.combine(output_AD, weight_A1)

A token with K experts is dispatched K times; each time is one assignment, see `runtime.experts.routing`. With K = 1
assignments are tokens.

An example with 2 ranks of 6 tokens each and 4 experts. Rank 0 holds the homes of experts 0 and 1 and an empty replica
slot, rank 1 holds the homes of 2 and 3 and a replica of 0: phy2log is [0, 1, -1 | 2, 3, 0].

                            rank 0                      rank 1
    expert of each token    [0, 2, 0, 0, 1, 0]          [0, 3, 0, 2, 0, 0]
    tokens by expert        [0, 2, 3, 5, 4, 1]          [0, 2, 4, 5, 3, 1]
    counts                  [4, 1, 1, 0]                [4, 0, 1, 1]
    quotas                  [4, 1, 0 | 1, 0, 0]         [1, 0, 0 | 1, 1, 3]
    first token of slot     [0, 4, - | 5, -, -]         [0, -, - | 4, 5, 1]
    positions               [5, 0, 1, 2, 3, 4]          [0, 4, 5, 1, 2, 3]
    sent, local, received   1, 5, 1                     1, 5, 1

Either rank computes six rows. Rank 1 sends one token of the hot expert 0 (its token 0) to slot 0 and receives rank 0's
token 1 for slot 3. Rows to compute are a rank's own and then those it receives, so rank 0 holds tokens 0, 2, 3, 5
(slot 0) and 4 (slot 1), then the row from rank 1, which belongs to slot 0: by slot they are rows [0, 1, 2, 3, 5, 4],
and slot_sizes are [5, 1, 0].

Shape suffixes: T tokens of this rank, A = T x K its assignments, E experts, S ranks, P slots of all ranks, Q slots of
this rank, M rows this rank computes, D model width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from data.arrays import IntArray
from runtime.distributed.ranks import Ranks


@njit(cache=True, nogil=True)
def counts_of(ends_SE: npt.NDArray[np.int32]) -> IntArray:
    """Sizes of groups from the rows at which they end: ends [2, 2, 5] give [2, 0, 3]."""
    counts_SE = ends_SE.astype(np.int64)
    counts_SE[:, 1:] -= ends_SE[:, :-1]
    return counts_SE


@dataclass(slots=True)  # not frozen: that alone takes 2 microseconds for each of a layer's parts
class DispatchPart:
    """One rank's dispatch for all its slots of a layer, or for some of them.

    Attributes:
        start: Where this part begins in the layer's index, which holds one after the other:
            - positions among the rank's tokens sorted by expert, first of the tokens it sends, by slot, then of those
              it computes itself, by slot;
            - for each row sorted by slot, the row it is among own rows and then received rows;
            - the inverse, for each row its position among the rows sorted by slot;
            - where the rows of each buffer end, counted on each device of this process from 0.
        num_sent: Number of tokens it sends.
        num_local: Number of tokens it computes itself.
        num_rows: Number of rows it computes, M.
        exchanged: Rows that all ranks together send to other ranks.
        send_sizes: Rows sent to each rank, `[S]`; 0 for this rank.
        receive_sizes: Rows received from each rank, `[S]`; 0 for this rank.
        slot_sizes: Rows of each slot of this rank, `[Q]`; they sum to M.
    """

    start: int
    num_sent: int
    num_local: int
    num_rows: int
    exchanged: int
    send_sizes: list[int]
    receive_sizes: list[int]
    slot_sizes: IntArray

    @property
    def num_tokens(self) -> int:
        """Assignments of this rank's tokens, computed here or elsewhere."""
        return self.num_sent + self.num_local

    @property
    def num_received(self) -> int:
        """Rows that other ranks send here."""
        return self.num_rows - self.num_local

    @property
    def ends_at(self) -> int:
        """Where the ends of the buffers' rows begin in the index."""
        return self.start + self.num_tokens + 2 * self.num_rows

    @property
    def needs_exchange(self) -> bool:
        """Whether any rank sends a row; equal on all ranks, because it decides whether the collective is called."""
        return self.exchanged > 0


def plan_dispatch(
    quota_SP: IntArray, phy2log_P: IntArray, rank: int, windows: IntArray, buffer_Q: IntArray,
    buffers: tuple[int, int], load_G: IntArray,
) -> tuple[npt.NDArray[np.int32], list[DispatchPart]]:  # fmt: skip
    """Plans one rank's dispatch under the quotas of all ranks.

    Args:
        quota_SP: Tokens from each rank to each slot.
        phy2log_P: Logical expert in each slot, -1 where it is empty.
        rank: This rank.
        windows: Which slots of every rank are dispatched together, first and stop among a rank's slots: `[parts, 2]`.
        buffer_Q: Buffer of each slot of this rank.
        buffers: Devices of this process, and buffers of each.
        load_G: Tokens of every device, to which those of this plan are added.

    Returns:
        The indices of all parts in one array, and the parts.
    """
    index, counts, sizes = _plan(quota_SP, phy2log_P, rank, windows, buffer_Q, *buffers, load_G)
    world = len(quota_SP)
    parts = [
        DispatchPart(
            start, sent, local, rows, exchanged,
            each[:world].tolist(), each[world : 2 * world].tolist(), each[2 * world :],
        )
        for (start, sent, local, rows, exchanged), each in zip(counts[:-1].tolist(), sizes, strict=True)
    ]  # fmt: skip
    return index[: counts[-1, 0]], parts


@njit(cache=True, nogil=True)
def _plan(
    quota_SP: IntArray,
    phy2log_P: IntArray,
    rank: int,
    windows: IntArray,
    buffer_Q: IntArray,
    devices: int,
    buffers: int,
    load_G: IntArray,
) -> tuple[npt.NDArray[np.int32], IntArray, IntArray]:
    """The index; for each part its start and counts, and then the index' length; for each part its sizes."""
    world, slots = quota_SP.shape[0], quota_SP.shape[1] // quota_SP.shape[0]
    first_P, rows = first_token_of_slots(quota_SP[rank], phy2log_P), 0
    for source in range(world):
        for slot in range(quota_SP.shape[1]):
            load_G[slot * len(load_G) // quota_SP.shape[1]] += quota_SP[source, slot]
        for slot in range(rank * slots, (rank + 1) * slots):
            rows += quota_SP[source, slot]
    room = quota_SP[rank].sum() + 2 * rows + len(windows) * devices * buffers
    index, counts = np.empty(room, dtype=np.int32), np.zeros((len(windows) + 1, 5), dtype=np.int64)
    sizes, size_N = np.zeros((len(windows), 2 * world + slots), dtype=np.int64), np.empty((devices, buffers), np.int64)
    at = 0
    for part in range(len(windows)):
        counts[part, 0], begin, end = at, windows[part, 0], windows[part, 1]
        at = _fill(quota_SP, first_P, rank, begin, end, index, at, counts[part], sizes[part])
        size_N[:] = 0
        for slot in range(begin, end if devices else begin):
            size_N.ravel()[buffer_Q[slot]] = sizes[part, 2 * world + slot]
        for device in range(devices):
            total = 0
            for buffer in range(buffers):
                total += size_N[device, buffer]
                index[at] = total
                at += 1
    counts[-1, 0] = at
    return index, counts, sizes


@njit(cache=True, nogil=True)
def _fill(
    quota_SP: IntArray, first_P: IntArray, rank: int, begin: int, end: int, index: npt.NDArray[np.int32], at: int,
    counts: IntArray, sizes: IntArray,
) -> int:  # fmt: skip
    """Writes one part's positions, rows by slot and their inverse to `index`, from `at` on; returns where it stopped.

    Adds to `counts` the tokens sent, tokens computed here, rows computed here, and rows that all ranks exchange; to
    `sizes` the rows sent to each rank, received from each rank, and of each slot.
    """
    world, slots = quota_SP.shape[0], quota_SP.shape[1] // quota_SP.shape[0]
    here, began = rank * slots, at
    send_S, receive_S, sizes_Q = sizes[:world], sizes[world : 2 * world], sizes[2 * world :]
    for step in range(world):  # the other ranks in order, this one last
        other = rank if step == world - 1 else step + (step >= rank)
        for slot in range(other * slots + begin, other * slots + end):
            for position in range(first_P[slot], first_P[slot] + quota_SP[rank, slot]):
                index[at] = position
                at += 1
            send_S[other] += quota_SP[rank, slot] if other != rank else 0
    counts[1] = send_S.sum()
    counts[2] = at - began - counts[1]
    for source in range(world):
        for other in range(world):
            for slot in range(other * slots + begin, other * slots + end):
                counts[4] += quota_SP[source, slot] if source != other else 0
        for slot in range(begin, end):
            sizes_Q[slot] += quota_SP[source, here + slot]
            receive_S[source] += quota_SP[source, here + slot] if source != rank else 0
    counts[3] = sizes_Q.sum()
    by_slot, by_row, row = at, at + counts[3], 0
    for step in range(world):  # own rows come first, and inside a slot the rows of rank 0
        source = rank if step == 0 else step - (step <= rank)
        start = 0
        for slot in range(begin, end):
            place = start
            for other in range(source):
                place += quota_SP[other, here + slot]
            for _ in range(quota_SP[source, here + slot]):
                index[by_slot + place], index[by_row + row] = row, place
                place += 1
                row += 1
            start += sizes_Q[slot]
    at = by_row + row
    return at


@njit(cache=True, nogil=True)
def first_token_of_slots(quota_P: IntArray, phy2log_P: IntArray) -> IntArray:
    """Position of each slot's first token among a rank's tokens sorted by expert, `[P]`.

    An expert's tokens are divided among its slots in the order of the slots.
    """
    next_E = np.zeros(phy2log_P.max() + 2, dtype=np.int64)
    for slot, expert in enumerate(phy2log_P):
        next_E[expert + 1] += quota_P[slot] if expert >= 0 else 0
    next_E = next_E.cumsum()
    first_P = np.zeros_like(quota_P)
    for slot, expert in enumerate(phy2log_P):
        if expert >= 0:
            first_P[slot] = next_E[expert]
            next_E[expert] += quota_P[slot]
    return first_P


def compile_kernels() -> None:
    """Compiles the index arithmetic and caches it on disk: some seconds once, none afterwards."""
    counts_SE, phy2log = counts_of(np.ones((1, 2), dtype=np.int32)), np.arange(2)
    phy2log.flags.writeable = False  # as in a plan: numba compiles for either
    plan_dispatch(counts_SE, phy2log, 0, np.array([[0, 2]]), np.arange(2), (1, 2), np.zeros(1, dtype=np.int64))


def tokens_of(assignment_A: Tensor, per_token: int) -> Tensor:
    """The token of each assignment."""
    return assignment_A if per_token == 1 else assignment_A.div(per_token, rounding_mode="floor")


def weighed(rows_MD: Tensor, weight_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows times router weights, in place unless the result has another dtype."""
    return rows_MD.mul_(weight_M1) if rows_MD.dtype == dtype else rows_MD * weight_M1


class TokenDispatch:
    """One all-to-all of tokens and the one back; call `received`, `send_back` and `combine` in this order.

    The constructor starts sending. Other work may run between the calls, while rows travel. Tokens to send, tokens
    computed here and received rows lie in one buffer in this order, on the way there and on the way back.

    Args:
        hidden_TD: This rank's hidden states.
        assignment_A: Its assignments sorted by expert.
        per_token: Assignments of a token, K.
        index: The layer's indices, on the device.
        part: Rows that stay, leave and arrive.
        ranks: The ranks.
    """

    def __init__(
        self, hidden_TD: Tensor, assignment_A: Tensor, per_token: int, index: Tensor, part: DispatchPart, ranks: Ranks
    ) -> None:
        self.part, self._ranks, tokens, rows = part, ranks, part.num_tokens, part.num_rows
        self._assignment = assignment_A.index_select(0, index.narrow(0, part.start, tokens))
        token = tokens_of(self._assignment, per_token)
        self._by_slot = index.narrow(0, part.start + tokens, rows)
        self._by_row = index.narrow(0, part.start + tokens + rows, rows)
        self._there_MD = hidden_TD.new_empty((tokens + part.num_received, hidden_TD.shape[-1]))
        torch.index_select(hidden_TD, 0, token, out=self._there_MD.narrow(0, 0, tokens))
        if part.needs_exchange:
            sent, received = self._ends(self._there_MD)
            self._work = ranks.all_to_all(sent, part.send_sizes, received, part.receive_sizes)

    def wait(self) -> None:
        """Waits for the rows that were sent last: on a CPU the host waits, on CUDA what is issued from now on."""
        if self.part.needs_exchange:
            self._work.wait()

    def received(self) -> Tensor:
        """Rows to compute, sorted by slot, `[M, D]`; call `wait` first."""
        rows_MD = self._rows(self._there_MD)
        return rows_MD.index_select(0, self._by_slot) if self.part.num_received else rows_MD

    def send_back(self, output_MD: Tensor) -> None:
        """Starts sending the outputs of received rows, sorted by slot, back to their ranks."""
        part, self._back_MD = self.part, output_MD
        if not part.needs_exchange:
            return
        self._back_MD = torch.empty_like(self._there_MD)
        if part.num_received:
            torch.index_select(output_MD, 0, self._by_row, out=self._rows(self._back_MD))
        else:
            self._rows(self._back_MD).copy_(output_MD)
        returned, outgoing = self._ends(self._back_MD)
        self._work = self._ranks.all_to_all(outgoing, part.receive_sizes, returned, part.send_sizes)

    def combine(self, output_AD: Tensor, weight_A1: Tensor) -> None:
        """Writes outputs times router weights to the assignments' rows; call `wait` first."""
        rows_MD = self._back_MD.narrow(0, 0, self.part.num_tokens)
        rows_MD = weighed(rows_MD, weight_A1.index_select(0, self._assignment), output_AD.dtype)
        output_AD.index_copy_(0, self._assignment, rows_MD)

    def _rows(self, buffer_MD: Tensor) -> Tensor:
        """The part of a buffer that is computed here."""
        return buffer_MD.narrow(0, self.part.num_sent, self.part.num_rows)

    def _ends(self, buffer_MD: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of a buffer for this rank's tokens elsewhere, and for other ranks' tokens here."""
        part = self.part
        return buffer_MD.narrow(0, 0, part.num_sent), buffer_MD.narrow(0, part.num_tokens, part.num_received)
