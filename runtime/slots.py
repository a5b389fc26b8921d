"""SlotWeights: the expert weights of one MoE layer that this process holds, slot by slot and device by device.

Home slots have one place each. A replica slot has two, of which one is in force: a move writes the other one while the
model computes, and a commit switches over. Places of a device are contiguous, so one grouped product serves them all.

Shape suffixes: G devices, P slots of this process, N places of this process, F inner width, D model width.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from runtime.plan import IntArray, ReplicationPlan
from runtime.source import ExpertSource


class SlotWeights:
    """Places of one layer on the devices of this process.

    Args:
        plan: A plan without replicas, which says where homes are.
        layer: Which row of the plan is this layer's.
        devices: The devices of this process, out of all of the plan's.
        shape_FD: Inner width and model width of an expert.
        like: Any tensor with the dtype and device that the places are to have.

    Attributes:
        slots: This process' slots among all of the plan's.
    """

    def __init__(
        self, plan: ReplicationPlan, layer: int, devices: range, shape_FD: tuple[int, int], like: Tensor
    ) -> None:
        self.layer, self.devices = layer, devices
        self.slots = slice(devices.start * plan.slots_per_device, devices.stop * plan.slots_per_device)
        self._home_P = plan.is_home_slot[self.slots]
        self._expert_P = plan.phy2log[layer, self.slots]
        sizes = np.where(self._home_P, 1, 2)
        self._first_P = np.cumsum(sizes) - sizes
        self._in_force_P = np.zeros_like(self._first_P)
        self.wi_NFD = like.new_zeros((int(sizes.sum()), *shape_FD))
        self.wo_NDF = like.new_zeros((int(sizes.sum()), *reversed(shape_FD)))

    @torch.no_grad()
    def fill(self, source: ExpertSource) -> None:
        """Reads the experts at home here."""
        for slot in np.flatnonzero(self._home_P):
            place = int(self._first_P[slot])
            source.fill(self.layer, int(self._expert_P[slot]), self.wi_NFD[place], self.wo_NDF[place])

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return self.wi_NFD[0].nbytes + self.wo_NDF[0].nbytes

    @property
    def places(self) -> IntArray:
        """The place in force of each slot here, `[P]`."""
        return np.asarray(self._first_P + self._in_force_P)

    def by_place(self, value_P: IntArray) -> IntArray:
        """Values of the slots here, at the places in force, device by device, `[G, N / G]`; 0 at all others."""
        value_N = value_P
        if len(value_P) < len(self.wi_NFD):  # without replica slots, places are slots
            value_N = np.zeros(len(self.wi_NFD), dtype=np.int64)
            value_N[self.places] = value_P
        return value_N.reshape(len(self.devices), -1)

    def block(self, device: int) -> tuple[Tensor, Tensor]:
        """The matrices in the places of one device of this process: `[N, D, F]` and `[N, F, D]`."""
        size = len(self.wi_NFD) // len(self.devices)
        wi_NFD, wo_NDF = (stacked.narrow(0, device * size, size) for stacked in (self.wi_NFD, self.wo_NDF))
        return wi_NFD.transpose(1, 2), wo_NDF.transpose(1, 2)

    def holds(self, slot: int) -> bool:
        """Whether a slot of the plan is one of this process'."""
        return self.slots.start <= slot < self.slots.stop

    def in_force(self, slot: int) -> tuple[Tensor, Tensor]:
        """The weights that one of the plan's slots computes with now."""
        place = int(self.places[slot - self.slots.start])
        return self.wi_NFD[place], self.wo_NDF[place]

    def spare(self, slot: int) -> tuple[Tensor, Tensor]:
        """The other place of a replica slot, to be written to; it takes effect at `commit`."""
        local = slot - self.slots.start
        assert not self._home_P[local], f"slot {slot} is a home"
        place = int(self._first_P[local] + 1 - self._in_force_P[local])
        return self.wi_NFD[place], self.wo_NDF[place]

    def commit(self, slots: Iterable[int]) -> None:
        """Switches written slots over to their other place; those of other processes are none of its business."""
        for slot in slots:
            if self.holds(slot):
                self._in_force_P[slot - self.slots.start] ^= 1
