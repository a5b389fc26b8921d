"""ResidentSlots: the expert weights of one MoE layer in this process, when all of them fit into memory.

A home slot has one buffer. A replica slot has two: the active copy computes, while a transfer writes the next expert
into the standby copy; `commit` swaps the two. The buffers of a device lie next to each other, so that one grouped
product serves all its slots:

    slots of a device        home A, home B, replica, replica
    its buffers              [A, B, active, standby, standby, active]      here the second replica slot was swapped

Shape suffixes: G devices of this process, P slots of this process, N buffers of this process, M rows, D model width.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.arrays import BoolArray, IntArray
from runtime.balancing.plan import ReplicationPlan
from runtime.distributed.device import Stopwatch
from runtime.distributed.shared_block import SharedBlock
from runtime.experts.grouped_mm import ExpertFunction, GroupedExperts
from runtime.experts.weights import ExpertSource


def first_buffers(is_home_P: BoolArray, num_devices: int) -> tuple[IntArray, int]:
    """The first buffer of each slot of a process, `[P]`, and the buffers of each device.

    Home slots have one buffer, replica slots two. Devices of a process get equally many buffers: as many as the device
    with most replica slots needs.
    """
    buffers_GP = np.where(is_home_P, 1, 2).reshape(num_devices, -1)
    each = int(buffers_GP.sum(-1).max())
    first_GP = buffers_GP.cumsum(-1) - buffers_GP + np.arange(num_devices)[:, None] * each
    return first_GP.ravel(), each


class ResidentSlots:
    """The slots of one layer on the devices of this process.

    Args:
        plan: A plan without replicas; it says which slots are homes, and of which experts.
        layer: Row of the plan.
        devices: The devices of this process, out of all the plan's devices.
        function: What an expert computes, and with which tensors.
        like: Any tensor with the dtype and device of the weights.
        shared: Whether other processes shall read the weights.
        whole: The model's own tensors of the layer, if they may serve as the buffers: of one device that holds every
            expert, in order, without replica slots. None allocates buffers.

    Attributes:
        blocks: The memory of each tensor of the experts; see `ExpertFormat`.
        tensors: The tensors in them, each with one row for each buffer.
        span: This process' slots among all slots of the plan.
        experts: The weights of each device here, ready to compute.
    """

    can_overlap = True

    def __init__(
        self,
        plan: ReplicationPlan,
        layer: int,
        devices: range,
        function: ExpertFunction,
        like: Tensor,
        shared: bool = False,
        whole: Sequence[Tensor] | None = None,
    ) -> None:
        self.layer, self.devices, self._own = layer, devices, whole is None
        self.span = slice(devices.start * plan.slots_per_device, devices.stop * plan.slots_per_device)
        self._home_P = plan.is_home_slot[layer, self.span]
        self._expert_P = plan.phy2log[layer, self.span]
        self._first_P, each = first_buffers(self._home_P, len(devices))
        self._swapped_P = np.zeros_like(self._first_P)
        if whole is None:
            shapes = [(each * len(devices), *shape) for shape in function.format.shapes]
            self.blocks = [
                SharedBlock.zeros(shape, like) if shared else SharedBlock(like.new_zeros(shape)) for shape in shapes
            ]
        else:
            self.blocks = [SharedBlock(tensor) for tensor in whole]
        self.tensors = [block.tensor for block in self.blocks]
        by_device = zip(*(tensor.chunk(len(devices)) for tensor in self.tensors), strict=True)
        self.experts = [GroupedExperts(tensors, function) for tensors in by_device]
        self._busy = [Stopwatch(like.device, on=False) for _ in devices]

    @torch.no_grad()
    def fill(self, source: ExpertSource) -> None:
        """Reads the experts of the home slots, unless the buffers are the model's own tensors."""
        for slot in np.flatnonzero(self._home_P) if self._own else ():
            source.fill(self.layer, int(self._expert_P[slot]), self._buffer(int(self._first_P[slot])))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return sum(tensor[0].nbytes for tensor in self.tensors)

    @property
    def active_buffers(self) -> IntArray:
        """Index of each slot's active copy among the buffers, `[P]`."""
        return np.asarray(self._first_P + self._swapped_P)

    @property
    def buffers(self) -> tuple[int, int]:
        """Devices here, and buffers of each."""
        return len(self.experts), len(self.tensors[0]) // len(self.experts)

    def compute(self, rows_MD: Tensor, size_P: IntArray, reference_P: IntArray, ends: Tensor | None) -> Tensor:
        """Computes rows sorted by slot, device after device; see `runtime.experts.layer.Slots`."""
        size_GN, reference_GN = self._by_buffer(size_P), self._by_buffer(reference_P)
        parts_MD = [rows_MD] if len(self.experts) == 1 else rows_MD.split_with_sizes(size_GN.sum(-1).tolist())
        ends_GN = [None] * len(self.experts) if ends is None else ends.chunk(len(self.experts))
        outputs_MD = []
        for device, part_MD in enumerate(parts_MD):
            if part_MD.shape[0]:
                with self._busy[device]:
                    outputs_MD.append(
                        self.experts[device].compute(part_MD, size_GN[device], reference_GN[device], ends_GN[device])
                    )
        return outputs_MD[0] if len(outputs_MD) == 1 else torch.cat([rows_MD.narrow(0, 0, 0), *outputs_MD])

    @property
    def needs_no_sizes(self) -> bool:
        """Whether `compute_groups` may be called: one device, no replica slots, and one kernel for all experts."""
        return len(self.experts) == 1 and len(self._first_P) == len(self.tensors[0]) and self.experts[0].needs_no_sizes

    def compute_groups(self, rows_MD: Tensor, ends_P: Tensor) -> Tensor:
        """Outputs for rows sorted by slot, whose sizes only the device knows; see `GroupedExperts.compute_groups`."""
        with self._busy[0]:
            return self.experts[0].compute_groups(rows_MD, ends_P)

    def measure(self, on: bool) -> None:
        """Begins to measure times anew, or ends it."""
        for stopwatch in self._busy:
            stopwatch.restart(on)

    def take_busy_ms(self) -> list[float]:
        """Milliseconds each device here computed since the last call of this method."""
        return [stopwatch.take_ms() for stopwatch in self._busy]

    def _by_buffer(self, value_P: IntArray) -> IntArray:
        """A value of each slot at its active buffer, 0 at standby buffers, device by device: `[G, N / G]`."""
        value_N = value_P
        if len(value_P) < len(self.tensors[0]):  # without replica slots there is one buffer for each slot
            value_N = np.zeros(len(self.tensors[0]), dtype=np.int64)
            value_N[self.active_buffers] = value_P
        return value_N.reshape(len(self.devices), -1)

    def holds(self, slot: int) -> bool:
        """Whether a slot of the plan belongs to this process."""
        return self.span.start <= slot < self.span.stop

    def _buffer(self, buffer: int) -> list[Tensor]:
        """The tensors of the expert in a buffer."""
        return [tensor[buffer] for tensor in self.tensors]

    def active(self, slot: int) -> list[Tensor]:
        """The active copy of a slot of the plan."""
        return self._buffer(int(self.active_buffers[slot - self.span.start]))

    def standby(self, slot: int) -> list[Tensor]:
        """The standby copy of a replica slot of the plan; what is written to it takes effect at `commit`."""
        local = slot - self.span.start
        assert not self._home_P[local], f"slot {slot} is a home slot and has no standby copy"
        return self._buffer(int(self._first_P[local] + 1 - self._swapped_P[local]))

    def commit(self, slots: Iterable[int]) -> None:
        """Makes the standby copy of each written slot active. Slots of other processes are ignored."""
        for slot in slots:
            if self.holds(slot):
                self._swapped_P[slot - self.span.start] ^= 1
