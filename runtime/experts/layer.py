"""ReplicatedExperts: the experts of one MoE layer, with the work spread over slots on several devices.

It replaces a Switch model's experts module (`forward`), and computes for the experts modules of other families
(`compute`). Outputs equal the unmodified module's. Under torchrun tokens are dispatched to the ranks that hold their
slots. A single process emulates the devices: it computes and times the work of each device in turn.

Shape suffixes: T tokens of this rank, K experts of a token, A = T x K assignments (see `runtime.experts.routing`), E
logical experts, S ranks, P slots of all ranks, Q slots of this rank, M rows this rank computes, G devices, D model
width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.arrays import IntArray
from runtime.balancing.max_flow import least_time_quotas
from runtime.balancing.nodes import check_nodes
from runtime.distributed.device import Stopwatch, upload
from runtime.distributed.ranks import Ranks
from runtime.experts.counters import LayerCounters
from runtime.experts.dispatch import TokenDispatch, counts_of, plan_dispatch, tokens_of, weighed
from runtime.experts.grouped_mm import PIECE_ROWS, pieces_of
from runtime.experts.protocols import Probes, Slots
from runtime.experts.routing import loads_by_sequence, sort_on_device, sort_on_host

OVERLAP_MIN_TOKENS = {"cpu": 512, "cuda": 16384}
"""Assignments a rank from which a layer runs in two halves, one of which travels while the other computes.

On a CPU measured over gloo; on CUDA estimated from NVLink's rate and the cost of two more collectives, not measured.
"""


class ReplicatedExperts(nn.Module):
    """Computes a layer's experts over the slots of a plan.

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
        counters: What the layer computed since they were reset.
        probes: Forecasts the layer that runs next; its forecast travels with the counts. None forecasts nothing.
        waited: Time this process waited for other ranks; on CUDA, time its stream waited for their rows.
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
        check_nodes(num_devices, devices_per_node)
        self.devices_per_node, self.expert_overhead_tokens = devices_per_node, expert_overhead_tokens
        self.slots, self.phy2log, self.ranks, self.num_devices = slots, phy2log, ranks, num_devices
        self.num_experts = int(phy2log.max()) + 1
        self.probes: Probes | None = None
        self.waited = Stopwatch(ranks.device, on=False)
        self._skipped_T: Tensor | None = None
        self._sequences = 0
        self._experts_E: Tensor | None = None
        self._one_device = num_devices == 1 and np.array_equal(phy2log, np.arange(len(phy2log)))
        self.reset_counters()
        self.eval()

    def begin(self, phy2log: IntArray, skipped_T: Tensor | None, measure: bool = True, sequences: int = 0) -> None:
        """Begins a batch and resets the counters.

        Args:
            phy2log: The layer's row of the active plan, `[P]`.
            skipped_T: Whether the token need not be computed; None computes all tokens.
            measure: Whether to measure times, which on CUDA takes events.
            sequences: Sequences whose loads are counted each on its own; 0 counts the batch's alone.
        """
        self.phy2log, self._skipped_T, self._sequences = phy2log, skipped_T, sequences
        self.measure(measure)
        self.reset_counters()

    def measure(self, on: bool) -> None:
        """Begins to measure times anew, or ends it."""
        self.waited.restart(on)
        self.slots.measure(on)

    def begin_step(self, skipped_T: Tensor | None) -> None:
        """Begins a decoder step of the batch, with skipped tokens of its own; the counters go on."""
        self._skipped_T = skipped_T

    def change_plan(self, phy2log: IntArray) -> None:
        """Follows a plan that was committed within the batch; the counters go on."""
        self.phy2log = phy2log

    def end(self) -> None:
        """Ends the batch: from now on all tokens are computed. The counters stay readable."""
        self._skipped_T, self._sequences = None, 0
        self.counters.download()

    def reset_counters(self) -> None:
        """Begins to count anew; the counters so far stay with those who hold them."""
        self.counters = LayerCounters(self.num_experts, self.num_devices)

    def forward(self, hidden_TD: Tensor, one_hot_T1E: Tensor, weight_T1: Tensor) -> Tensor:
        """Same contract as `SwitchTransformersExperts`: tokens that are dropped or skipped get 0.

        Raises:
            RuntimeError: In training mode, or on a backward pass through the output.
        """
        return self.compute(hidden_TD, one_hot_T1E, weight_T1, self.training)

    def compute(self, hidden_TD: Tensor, choice: Tensor, weight_TK: Tensor, training: bool) -> Tensor:
        """Weighted sum of each token's experts, `[T, D]`; tokens that are dropped or skipped get 0.

        Args:
            hidden_TD: Hidden states.
            choice: What the router returned: a one-hot `[T, 1, E]`, or the experts' numbers `[T, K]`.
            weight_TK: Router weights.
            training: Whether the model is in training mode.

        Raises:
            RuntimeError: In training mode, or on a backward pass through the output.
        """
        if training:
            raise RuntimeError("Switchcast's experts run in inference only; call model.eval() before the model")
        if torch.is_grad_enabled():
            output_TD: Tensor = _WithoutGradients.apply(self._compute, hidden_TD, choice, weight_TK)  # type: ignore[no-untyped-call]
            return output_TD
        return self._compute(hidden_TD, choice, weight_TK)

    def _compute(self, hidden_TD: Tensor, choice: Tensor, weight_TK: Tensor) -> Tensor:
        weight_A1 = weight_TK.reshape(-1, 1)
        if hidden_TD.is_cpu:
            assignment_A, counts_2E = sort_on_host(choice, self._skipped_T, self.num_experts)
            self._count_sequences(assignment_A, counts_2E[0].cumsum(0), weight_A1)
            with self.waited:
                counts_S2E = self._gather(counts_2E, hidden_TD, choice)
            counts_SE, routed_E = np.ascontiguousarray(counts_S2E[:, 0]), counts_S2E[:, 1].sum(0)
        else:
            if self._experts_E is None:
                self._experts_E = torch.arange(self.num_experts, device=hidden_TD.device)
            assignment_A, ends_E, left_out_A = sort_on_device(choice, self._skipped_T, self._experts_E)
            if self._one_device and self.slots.needs_no_sizes:
                return self._compute_on_device(hidden_TD, assignment_A, ends_E, left_out_A, weight_A1)
            self._count_sequences(assignment_A, ends_E, weight_A1)
            # the one point where the host waits for the device: all sizes follow from the counts
            ends_S1E = self._gather(ends_E[None], hidden_TD, choice)
            counts_SE = counts_of(np.ascontiguousarray(ends_S1E[:, 0], dtype=np.int32))
            routed_E = counts_SE.sum(0)
        self.counters.load[:] += counts_SE.sum(0)
        if self._one_device:
            self.counters.device_load[0] = self.counters.load.sum()
            return self._compute_without_dispatch(hidden_TD, assignment_A, weight_A1, counts_SE[0], routed_E)
        quota_SP = self.split(counts_SE)
        # an empty slot, -1, reads the last expert's count, which does not matter: it gets no rows
        reference_Q = routed_E[self.phy2log[self.slots.span]]
        return self.dispatch_and_combine(hidden_TD, assignment_A, weight_A1, quota_SP, reference_Q)

    def _gather(self, rows_NE: Tensor, hidden_TD: Tensor, choice: Tensor) -> IntArray:
        """Rows of every rank, `[S, N, E]`; with probes the forecast travels as one more row."""
        if self.probes is None:
            return self.ranks.gather(rows_NE).cpu().numpy()
        forecast_E = self.probes.forecast(hidden_TD, choice, self._skipped_T)
        rows = self.ranks.gather(torch.cat([rows_NE, forecast_E[None].to(rows_NE.dtype)])).cpu().numpy()
        self.probes.use(rows[:, -1].sum(0))
        return rows[:, :-1]

    def _count_sequences(self, assignment_A: Tensor, ends_E: Tensor, weight_A1: Tensor) -> None:
        if self._sequences:
            per_sequence = len(weight_A1) // self._sequences
            self.counters.set_sequences(loads_by_sequence(assignment_A, ends_E, per_sequence, self._sequences))

    def split(self, counts_SE: IntArray) -> IntArray:
        """Assignments from each rank to each slot, `[S, P]`."""
        return least_time_quotas(  # what `split_by_quota` calls once it has checked its arguments
            counts_SE, counts_SE.sum(0), self.phy2log, self.num_devices, self.expert_overhead_tokens,
            self.devices_per_node or self.num_devices,
        )  # fmt: skip

    def dispatch_and_combine(
        self, hidden_TD: Tensor, assignment_A: Tensor, weight_A1: Tensor, quota_SP: IntArray, reference_Q: IntArray
    ) -> Tensor:
        """Dispatches assignments under the quotas, computes the rows that arrive, combines the outputs.

        Args:
            hidden_TD: Hidden states.
            assignment_A: Assignments sorted by expert.
            weight_A1: Router weights.
            quota_SP: Assignments from each rank to each slot.
            reference_Q: Rows that the unmodified model would multiply with the expert of each slot of this rank.
        """
        buffers, windows = (self.slots.active_buffers, self.slots.buffers), self._windows(quota_SP)
        packed, parts = plan_dispatch(
            quota_SP, self.phy2log, self.ranks.rank, windows, *buffers, self.counters.device_load
        )
        index, ends = upload(packed, hidden_TD.device), self.slots.buffers[0] * self.slots.buffers[1]
        per_token = _per_token(hidden_TD, weight_A1)
        dispatches = [TokenDispatch(hidden_TD, assignment_A, per_token, index, part, self.ranks) for part in parts]
        for dispatch, part in zip(dispatches, parts, strict=True):
            with self.waited:
                dispatch.wait()
            self.counters.sent += part.exchanged
            part_ends = index.narrow(0, part.ends_at, ends)
            dispatch.send_back(self.slots.compute(dispatch.received(), part.slot_sizes, reference_Q, part_ends))
        output_AD = _outputs(hidden_TD, weight_A1).zero_()
        for dispatch in dispatches:
            with self.waited:
                dispatch.wait()
            dispatch.combine(output_AD, weight_A1)
        return _summed(output_AD, hidden_TD)

    def _compute_on_device(
        self, hidden_TD: Tensor, assignment_A: Tensor, ends_E: Tensor, left_out_A: Tensor | None, weight_A1: Tensor
    ) -> Tensor:
        """As `_compute_without_dispatch`, with sizes that the host does not know: those left out come last."""
        self.counters.add_ends(ends_E)
        token_A = tokens_of(assignment_A, _per_token(hidden_TD, weight_A1))
        rows_MD = self.slots.compute_groups(hidden_TD.index_select(0, token_A), ends_E)
        output_AD = torch.empty_like(rows_MD).index_copy_(0, assignment_A, rows_MD)
        output_AD = weighed(output_AD, weight_A1, _output_dtype(hidden_TD, weight_A1))
        if left_out_A is not None:
            output_AD.masked_fill_(left_out_A[:, None], 0)
        return _summed(output_AD, hidden_TD)

    def _compute_without_dispatch(
        self, hidden_TD: Tensor, assignment_A: Tensor, weight_A1: Tensor, counts_E: IntArray, routed_E: IntArray
    ) -> Tensor:
        """The only device holds every expert once, so that slots are experts and nothing is split or sent."""
        computed = int(counts_E.sum())
        assignment = assignment_A.narrow(0, 0, computed)
        token = tokens_of(assignment, _per_token(hidden_TD, weight_A1))
        if hidden_TD.is_cpu:
            return self._compute_in_pieces(hidden_TD, assignment, token, weight_A1, counts_E, routed_E)
        rows_MD = self.slots.compute(hidden_TD.index_select(0, token), counts_E, routed_E, None)
        output_AD = _outputs(hidden_TD, weight_A1)
        if computed < output_AD.shape[0]:
            output_AD.zero_()
        output_AD.index_copy_(0, assignment, weighed(rows_MD, weight_A1.index_select(0, assignment), output_AD.dtype))
        return _summed(output_AD, hidden_TD)

    def _compute_in_pieces(
        self, hidden_TD: Tensor, assignment: Tensor, token: Tensor, weight_A1: Tensor, counts_E: IntArray,
        routed_E: IntArray,
    ) -> Tensor:  # fmt: skip
        """A few experts after the other, whose rows and intermediate results stay in the cache of a CPU."""
        output_TD = torch.zeros_like(hidden_TD, dtype=_output_dtype(hidden_TD, weight_A1))
        most = PIECE_ROWS if self.slots.can_overlap else len(token)  # a cache counts every call as a use
        for first, rows_E in pieces_of(counts_E, most):
            size = int(rows_E.sum())
            token_M, assignment_M = token.narrow(0, first, size), assignment.narrow(0, first, size)
            rows_MD = self.slots.compute(hidden_TD.index_select(0, token_M), rows_E, routed_E, None)
            output_TD.index_add_(0, token_M, weighed(rows_MD, weight_A1.index_select(0, assignment_M), output_TD.dtype))
        return output_TD.to(hidden_TD.dtype)

    def _windows(self, quota_SP: IntArray) -> IntArray:
        """Slots of a rank that are dispatched together, first and stop: all of them, or one half and then the other."""
        world, slots = self.ranks.world, len(self.phy2log) // self.ranks.world
        least = OVERLAP_MIN_TOKENS[self.ranks.device.type]
        if world == 1 or not self.slots.can_overlap or quota_SP.sum() < least * world:
            return np.array([[0, slots]])
        return np.array([[0, slots // 2], [slots // 2, slots]])


def _per_token(hidden_TD: Tensor, weight_A1: Tensor) -> int:
    """Experts of a token, K."""
    return weight_A1.shape[0] // max(hidden_TD.shape[0], 1)


def _output_dtype(hidden_TD: Tensor, weight_A1: Tensor) -> torch.dtype:
    """Of outputs before they are summed up: a sum of several is as precise as the router weights."""
    one = _per_token(hidden_TD, weight_A1) == 1
    return hidden_TD.dtype if one else torch.promote_types(hidden_TD.dtype, weight_A1.dtype)


def _outputs(hidden_TD: Tensor, weight_A1: Tensor) -> Tensor:
    """Memory for the output of each assignment, `[A, D]`."""
    shape = weight_A1.shape[0], hidden_TD.shape[1]
    return hidden_TD.new_empty(shape, dtype=_output_dtype(hidden_TD, weight_A1))


def _summed(output_AD: Tensor, hidden_TD: Tensor) -> Tensor:
    """The sum of each token's outputs, `[T, D]`, in the dtype of the hidden states."""
    if output_AD.shape == hidden_TD.shape:
        return output_AD
    return output_AD.view(*hidden_TD.shape[:1], -1, hidden_TD.shape[1]).sum(1).to(hidden_TD.dtype)


class _WithoutGradients(torch.autograd.Function):
    """Calls a function without recording gradients; its output refuses a backward pass."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("Switchcast's experts compute no gradients; train the model outside `with Engine(...)`")
