"""ReplicatedExperts: the drop-in for a Switch model's experts module. Same answers, work spread over slots and devices.

With one process for each device, tokens travel to their slots and back. In one process, devices are emulated: each
one's share of the work runs and is timed in turn.

Shape suffixes: T tokens of this rank, M rows, S ranks, E logical experts, P slots, N places, G devices, D model width.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from data.arrays import IntArray
from runtime.balancing.split import device_load, split_by_quota
from runtime.distributed.device import Stopwatch
from runtime.distributed.ranks import Ranks
from runtime.experts.dispatch import TokenDispatch, choices, route, starts


class Slots(Protocol):
    """What computes: the slots of this process in one layer."""

    @property
    def span(self) -> slice:
        """Which of the plan's slots they are."""
        ...

    def compute(self, rows_MD: Tensor, size_P: IntArray, plain_P: IntArray) -> Tensor:
        """Answers to rows sorted by slot, `[M, D]`; `plain_P` rows the plain model would multiply with the expert."""
        ...

    @property
    def whole(self) -> bool:
        """Whether a layer must be computed at once."""
        ...

    def take_busy_ms(self) -> list[float]:
        """Milliseconds each device of this process computed since the last take."""
        ...


OVERLAP_MIN_TOKENS = 1024
"""Tokens of all ranks from which on a layer runs in two halves, so that one half travels while the other computes."""


class ReplicatedExperts(nn.Module):
    """Computes `experts(hidden, one_hot, weights)` over the slots of a plan.

    Set `phy2log` (`[P]`, the layer's row of the plan in force) and `needed` (which rows of `hidden` must be computed;
    None means all) before a forward. Afterwards `load`, `device_load`, `sent` and the stopwatches tell what it did.

    Args:
        slots: The slots of this process.
        phy2log: The layer's row of the plan in force, `[P]`.
        ranks: The ranks; each has as many devices as this one.
        num_devices: G, over all ranks.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights.

    Attributes:
        load: Tokens of each expert that were computed on any rank, `[E]`, summed over the calls since `reset`.
        device_load: Tokens each device computed, `[G]`, likewise.
        sent: Tokens that left their rank, likewise.
        waited: How long this process waited for other ranks.
    """

    def __init__(
        self,
        slots: Slots,
        phy2log: IntArray,
        ranks: Ranks,
        num_devices: int,
        expert_overhead_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.slots, self.phy2log, self.ranks = slots, phy2log, ranks
        self.num_devices, self.expert_overhead_tokens = num_devices, expert_overhead_tokens
        self.waited = Stopwatch(torch.device("cpu"))
        self.needed: Tensor | None = None
        self._one_device = num_devices == 1 and np.array_equal(phy2log, np.arange(len(phy2log)))
        self.reset()

    def reset(self) -> None:
        """Starts counting anew."""
        self.load = np.zeros(int(self.phy2log.max()) + 1, dtype=np.int64)
        self.device_load = np.zeros(self.num_devices, dtype=np.int64)
        self.sent = 0

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: dropped tokens (all-zero rows), and rows not needed, get 0."""
        token_T, counts_2E = choices(one_hot_T1E[:, 0], self.needed)
        with self.waited:  # the one wait for the device: sizes must be known here
            counts_S2E = self.ranks.gather(counts_2E).cpu().numpy()
        counts_SE, plain_E = counts_S2E[:, 0], counts_S2E[:, 1].sum(0)
        np.add(self.load, counts_SE.sum(0), out=self.load)
        if self._one_device:
            self.device_load[0] = self.load.sum()
            return self._at_home(hidden_TD, token_T, weight_T1, counts_SE[0], plain_E)
        quota_SP = self.split(counts_SE)
        np.add(self.device_load, device_load(quota_SP, self.num_devices), out=self.device_load)
        plain_Q = plain_E[self.phy2log[self.slots.span]]  # of no meaning in empty slots
        return self.spread(hidden_TD, token_T, weight_T1, quota_SP, plain_Q)

    def split(self, counts_SE: IntArray) -> IntArray:
        """Tokens from each rank to each slot, `[S, P]`."""
        return split_by_quota(
            counts_SE, self.phy2log, self.num_devices, expert_overhead_tokens=self.expert_overhead_tokens
        )

    def spread(
        self, hidden_TD: Tensor, token_T: Tensor, weight_T1: Tensor, quota_SP: IntArray, plain_Q: IntArray
    ) -> Tensor:
        """Sends tokens, sorted by expert, where the quotas say; computes what arrives here; collects the results.

        `plain_Q` are the rows the plain model would multiply with the expert of each slot of this rank.
        """
        flights = []
        start_P = starts(quota_SP[self.ranks.rank], self.phy2log)
        for slots_P in self._halves(int(quota_SP.sum())):
            part_SP = np.where(slots_P, quota_SP, 0)
            away_SS = part_SP.reshape(len(part_SP), len(part_SP), -1).sum(-1) * ~np.eye(len(part_SP), dtype=bool)
            self.sent += int(away_SS.sum())
            way = route(part_SP, start_P, self.ranks.rank, self.slots.span)
            flight = TokenDispatch(hidden_TD, token_T, way, self.ranks, bool(away_SS.any()))
            flights.append((flight, part_SP[:, self.slots.span].sum(0)))
        for flight, size_Q in flights:
            with self.waited:
                rows_MD = flight.received()
            flight.send_back(self.slots.compute(rows_MD, size_Q, plain_Q))
        output_TD = torch.zeros_like(hidden_TD)
        for flight, _ in flights:
            with self.waited:
                flight.combine(output_TD, weight_T1)
        return output_TD

    def _at_home(
        self, hidden_TD: Tensor, token_T: Tensor, weight_T1: Tensor, counts_E: IntArray, plain_E: IntArray
    ) -> Tensor:
        """One device computes everything itself: there is nothing to split or send."""
        computed = int(counts_E.sum())
        token = token_T.narrow(0, 0, computed)
        result_MD = self.slots.compute(hidden_TD.index_select(0, token), counts_E, plain_E)
        result_MD *= weight_T1.index_select(0, token)
        output_TD = (torch.empty_like if computed == hidden_TD.shape[0] else torch.zeros_like)(hidden_TD)
        return output_TD.index_copy_(0, token, result_MD)

    def _halves(self, tokens: int) -> list[npt.NDArray[np.bool_]]:
        """Slots that run together, `[P]` each: all of them, or the first and the second half of each rank's."""
        slots = np.arange(len(self.phy2log))
        if self.ranks.world == 1 or self.slots.whole or tokens < OVERLAP_MIN_TOKENS:
            return [slots >= 0]
        per_rank = len(slots) // self.ranks.world
        first = slots % per_rank < per_rank // 2
        return [first, ~first]
