"""ResidentSlots: the expert weights of one MoE layer that this process holds, slot by slot and device by device.

Home slots have one place each. A replica slot has two, of which one is in force: a move writes the other one while the
model computes, and a commit switches over. Places of a device are contiguous, so one grouped product serves them all.

Shape suffixes: G devices, P slots of this process, N places of this process, F inner width, D model width.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from data.arrays import IntArray
from runtime.balancing.plan import ReplicationPlan
from runtime.distributed.device import Stopwatch
from runtime.experts.grouped_mm import Block
from runtime.experts.weights import ExpertSource


class ResidentSlots:
    """Places of one layer on the devices of this process.

    Args:
        plan: A plan without replicas, which says where homes are.
        layer: Which row of the plan is this layer's.
        devices: The devices of this process, out of all of the plan's.
        shape_FD: Inner width and model width of an expert.
        like: Any tensor with the dtype and device that the places are to have.
        activation: Between the two products of an expert.

    Attributes:
        span: This process' slots among all of the plan's.
        blocks: What each device here computes with.
    """

    whole = False

    def __init__(
        self,
        plan: ReplicationPlan,
        layer: int,
        devices: range,
        shape_FD: tuple[int, int],
        like: Tensor,
        activation: nn.Module,
    ) -> None:
        self.layer, self.devices = layer, devices
        self.span = slice(devices.start * plan.slots_per_device, devices.stop * plan.slots_per_device)
        self._home_P = plan.is_home_slot[self.span]
        self._expert_P = plan.phy2log[layer, self.span]
        sizes = np.where(self._home_P, 1, 2)
        self._first_P = np.cumsum(sizes) - sizes
        self._active_P = np.zeros_like(self._first_P)
        self.wi_NFD = like.new_zeros((int(sizes.sum()), *shape_FD))
        self.wo_NDF = like.new_zeros((int(sizes.sum()), *reversed(shape_FD)))
        stacks = (stacked.chunk(len(devices)) for stacked in (self.wi_NFD, self.wo_NDF))
        self.blocks = [Block(wi_NFD, wo_NDF, activation) for wi_NFD, wo_NDF in zip(*stacks, strict=True)]
        self._busy = [Stopwatch(like.device) for _ in devices]

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
        return np.asarray(self._first_P + self._active_P)

    def compute(self, rows_MD: Tensor, size_P: IntArray, plain_P: IntArray) -> Tensor:
        """Runs each device's rows, which lie next to each other, through its slots."""
        size_GN, plain_GN = self._by_place(size_P), self._by_place(plain_P)
        parts_MD = [rows_MD] if len(self.blocks) == 1 else rows_MD.split_with_sizes(size_GN.sum(-1).tolist())
        results_MD = []
        for device, part_MD in enumerate(parts_MD):
            if part_MD.shape[0]:
                with self._busy[device]:
                    results_MD.append(self.blocks[device].answer(part_MD, size_GN[device], plain_GN[device]))
        return results_MD[0] if len(results_MD) == 1 else torch.cat([rows_MD.narrow(0, 0, 0), *results_MD])

    def take_busy_ms(self) -> list[float]:
        """Milliseconds each device here computed since the last take."""
        return [watch.take_ms() for watch in self._busy]

    def _by_place(self, value_P: IntArray) -> IntArray:
        """Values of the slots here, at the places in force, device by device, `[G, N / G]`; 0 at all others."""
        value_N = value_P
        if len(value_P) < self.wi_NFD.shape[0]:  # without replica slots, places are slots
            value_N = np.zeros(self.wi_NFD.shape[0], dtype=np.int64)
            value_N[self.places] = value_P
        return value_N.reshape(len(self.devices), -1)

    def holds(self, slot: int) -> bool:
        """Whether a slot of the plan is one of this process'."""
        return self.span.start <= slot < self.span.stop

    def active(self, slot: int) -> tuple[Tensor, Tensor]:
        """The weights that one of the plan's slots computes with now."""
        place = int(self.places[slot - self.span.start])
        return self.wi_NFD[place], self.wo_NDF[place]

    def standby(self, slot: int) -> tuple[Tensor, Tensor]:
        """The other place of a replica slot, to be written to; it takes effect at `commit`."""
        local = slot - self.span.start
        assert not self._home_P[local], f"slot {slot} is a home"
        place = int(self._first_P[local] + 1 - self._active_P[local])
        return self.wi_NFD[place], self.wo_NDF[place]

    def commit(self, slots: Iterable[int]) -> None:
        """Switches written slots over to their other place; those of other processes are none of its business."""
        for slot in slots:
            if self.holds(slot):
                self._active_P[slot - self.span.start] ^= 1
