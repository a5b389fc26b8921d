"""ReplicatedExperts: drop-in for a Switch model's experts module, with the work spread over slots on several devices.

Outputs equal the unmodified module's. Under torchrun tokens are dispatched to the ranks that hold their slots. A single
process emulates the devices: it computes and times the work of each device in turn.

Shape suffixes: T tokens of this rank, E logical experts, S ranks, P slots of all ranks, Q slots of this rank, M rows
this rank computes, G devices, D model width.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data.arrays import BoolArray, IntArray
from runtime.balancing.split import device_load, split_by_quota
from runtime.distributed.device import Stopwatch
from runtime.distributed.ranks import Ranks
from runtime.experts.dispatch import TokenDispatch, first_token_of_slots, plan_dispatch, sort_by_expert

OVERLAP_MIN_TOKENS = 1024
"""Minimum number of tokens, over all ranks, for a layer to run in two halves: one travels while the other computes."""


class Slots(Protocol):
    """This process' slots of one layer: what `ReplicatedExperts` computes with."""

    @property
    def span(self) -> slice:
        """These slots among all slots of the plan."""
        ...

    @property
    def can_overlap(self) -> bool:
        """Whether a layer may be computed in two calls."""
        ...

    def compute(self, rows_MD: Tensor, size_Q: IntArray, reference_Q: IntArray) -> Tensor:
        """Outputs for rows sorted by slot, `[M, D]`.

        Args:
            rows_MD: Rows.
            size_Q: Rows of each slot; they sum to M.
            reference_Q: Rows that the unmodified model would multiply with the slot's expert.
        """
        ...

    def take_busy_ms(self) -> list[float]:
        """Milliseconds each device of this process computed since the last call of this method."""
        ...


class ReplicatedExperts(nn.Module):
    """Computes `experts(hidden, one_hot, weights)` over the slots of a plan.

    `begin` and `end` enclose a batch; in generation, `begin_step` and `change_plan` are called within it. A plain call
    of the model, outside a batch, computes all tokens under the last plan.

    Args:
        slots: The slots of this process.
        phy2log: The layer's row of the active plan, `[P]`.
        ranks: The ranks; all have equally many devices.
        num_devices: G, over all ranks.
        devices_per_node: Devices that share a fast network; the split keeps tokens there. None means one node.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights.

    Attributes:
        phy2log: The layer's row of the active plan, `[P]`.
        load: Tokens of each expert computed on any rank since the counters were reset, `[E]`.
        device_load: Tokens each device computed since then, `[G]`.
        sent: Tokens sent from one rank to another since then.
        waited: Time this process waited for other ranks.
    """

    def __init__(
        self,
        slots: Slots,
        phy2log: IntArray,
        ranks: Ranks,
        num_devices: int,
        devices_per_node: int | None = None,
        expert_overhead_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.devices_per_node, self.expert_overhead_tokens = devices_per_node, expert_overhead_tokens
        self.slots, self.phy2log, self.ranks, self.num_devices = slots, phy2log, ranks, num_devices
        self.waited = Stopwatch(torch.device("cpu"))
        self._needed_T: Tensor | None = None
        self._one_device = num_devices == 1 and np.array_equal(phy2log, np.arange(len(phy2log)))
        self.reset_counters()
        self.eval()

    def begin(self, phy2log: IntArray, needed_T: Tensor | None) -> None:
        """Begins a batch and resets the counters.

        Args:
            phy2log: The layer's row of the active plan, `[P]`.
            needed_T: Whether the token must be computed; None means all tokens.
        """
        self.phy2log, self._needed_T = phy2log, needed_T
        self.reset_counters()

    def begin_step(self, needed_T: Tensor | None) -> None:
        """Begins a decoder step of the batch, with needed tokens of its own; the counters go on."""
        self._needed_T = needed_T

    def change_plan(self, phy2log: IntArray) -> None:
        """Follows a plan that was committed within the batch; the counters go on."""
        self.phy2log = phy2log

    def end(self) -> None:
        """Ends the batch: from now on all tokens are computed. The counters stay readable."""
        self._needed_T = None

    def reset_counters(self) -> None:
        """Sets `load`, `device_load` and `sent` to 0."""
        self.load = np.zeros(int(self.phy2log.max()) + 1, dtype=np.int64)
        self.device_load = np.zeros(self.num_devices, dtype=np.int64)
        self.sent = 0

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: tokens that are dropped or not needed get 0.

        Raises:
            RuntimeError: In training mode, or on a backward pass through the output.
        """
        if self.training:
            raise RuntimeError("Switchcast's experts run in inference only; call model.eval() before the model")
        if torch.is_grad_enabled():
            output_TD: Tensor = _WithoutGradients.apply(self._compute, hidden_TD, one_hot_T1E, weight_T1)  # type: ignore[no-untyped-call]
            return output_TD
        return self._compute(hidden_TD, one_hot_T1E, weight_T1)

    def _compute(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        token_T, counts_2E = sort_by_expert(one_hot_T1E[:, 0], self._needed_T)
        with self.waited:  # the one point where the host waits for the device: all sizes follow from the counts
            counts_S2E = self.ranks.gather(counts_2E).cpu().numpy()
        counts_SE, routed_E = counts_S2E[:, 0], counts_S2E[:, 1].sum(0)
        np.add(self.load, counts_SE.sum(0), out=self.load)
        if self._one_device:
            self.device_load[0] = self.load.sum()
            return self._compute_without_dispatch(hidden_TD, token_T, weight_T1, counts_SE[0], routed_E)
        quota_SP = self.split(counts_SE)
        np.add(self.device_load, device_load(quota_SP, self.num_devices), out=self.device_load)
        # an empty slot, -1, reads the last expert's count, which does not matter: it gets no rows
        reference_Q = routed_E[self.phy2log[self.slots.span]]
        return self.dispatch_and_combine(hidden_TD, token_T, weight_T1, quota_SP, reference_Q)

    def split(self, counts_SE: IntArray) -> IntArray:
        """Tokens from each rank to each slot, `[S, P]`."""
        return split_by_quota(
            counts_SE, self.phy2log, self.num_devices,
            expert_overhead_tokens=self.expert_overhead_tokens, devices_per_node=self.devices_per_node,
        )  # fmt: skip

    def dispatch_and_combine(
        self, hidden_TD: Tensor, token_T: Tensor, weight_T1: Tensor, quota_SP: IntArray, reference_Q: IntArray
    ) -> Tensor:
        """Dispatches tokens under the quotas, computes the rows that arrive, combines the outputs.

        Args:
            hidden_TD: Hidden states.
            token_T: Tokens sorted by expert.
            weight_T1: Router weights.
            quota_SP: Tokens from each rank to each slot.
            reference_Q: Rows that the unmodified model would multiply with the expert of each slot of this rank.
        """
        rank = self.ranks.rank
        first_P = first_token_of_slots(quota_SP[rank], self.phy2log)
        dispatches = []
        for slots_P in self._halves(int(quota_SP.sum())):
            plan = plan_dispatch(np.where(slots_P, quota_SP, 0), first_P, rank, self.slots.span)
            self.sent += plan.exchanged
            dispatches.append(TokenDispatch(hidden_TD, token_T, plan, self.ranks))
        for dispatch in dispatches:
            with self.waited:
                rows_MD = dispatch.received()
            dispatch.send_back(self.slots.compute(rows_MD, dispatch.plan.slot_sizes, reference_Q))
        output_TD = torch.zeros_like(hidden_TD)
        for dispatch in dispatches:
            with self.waited:
                dispatch.combine(output_TD, weight_T1)
        return output_TD

    def _compute_without_dispatch(
        self, hidden_TD: Tensor, token_T: Tensor, weight_T1: Tensor, counts_E: IntArray, routed_E: IntArray
    ) -> Tensor:
        """The only device holds every expert once, so that slots are experts and nothing is split or sent."""
        computed = int(counts_E.sum())
        token = token_T.narrow(0, 0, computed)
        rows_MD = self.slots.compute(hidden_TD.index_select(0, token), counts_E, routed_E)
        rows_MD *= weight_T1.index_select(0, token)
        output_TD = (torch.empty_like if computed == hidden_TD.shape[0] else torch.zeros_like)(hidden_TD)
        return output_TD.index_copy_(0, token, rows_MD)

    def _halves(self, tokens: int) -> list[BoolArray]:
        """Slots that are dispatched together, `[P]` each: all, or on each rank one half and then the other."""
        slots = np.arange(len(self.phy2log))
        if self.ranks.world == 1 or not self.slots.can_overlap or tokens < OVERLAP_MIN_TOKENS:
            return [slots >= 0]
        per_rank = len(slots) // self.ranks.world
        first = slots % per_rank < per_rank // 2
        return [first, ~first]


class _WithoutGradients(torch.autograd.Function):
    """Calls a function without recording gradients; its output refuses a backward pass."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("Switchcast's experts compute no gradients; train the model outside `with Engine(...)`")
