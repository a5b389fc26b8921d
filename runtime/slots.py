"""SlotWeights: the expert weights of one MoE layer, laid out slot by slot and device by device.

Home slots have one place each. A replica slot has two, of which one is in force: a move writes the other one while the
model computes, and a commit switches over. Blocks of a device are contiguous, so one grouped product serves them all.

Shape suffixes: G devices, E logical experts, P slots, N places (E + 2R), F inner width, D model width.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from runtime.plan import IntArray, ReplicationPlan, SlotMove


class SlotWeights:
    """Places of one layer, filled from the model's own experts.

    The original experts' weights become views of their home slots, so nothing is held twice and the plain model still
    runs. `release` gives each of them its own storage back.

    Args:
        experts: The model's experts in logical order; each has `wi` and `wo`.
        plan: A plan without replicas, which says where homes are.
        layer: Which row of the plan is this layer's.
    """

    def __init__(self, experts: list[nn.Module], plan: ReplicationPlan, layer: int) -> None:
        self.num_devices = plan.num_devices
        homes = plan.is_home_slot
        sizes = np.where(homes, 1, 2)
        self._first = np.concatenate(([0], np.cumsum(sizes)))[:-1]
        self._in_force = np.zeros(len(homes), dtype=np.int64)
        self.is_home_P = homes
        wi, wo = self._linear(experts[0], "wi"), self._linear(experts[0], "wo")
        places = int(sizes.sum())
        self.wi_NFD = torch.zeros((places, *wi.shape), dtype=wi.dtype, device=wi.device)
        self.wo_NDF = torch.zeros((places, *wo.shape), dtype=wo.dtype, device=wo.device)
        self._experts = experts
        with torch.no_grad():
            for expert, module in enumerate(experts):
                place = int(self._first[plan.homes[layer, expert]])
                for name, stacked in (("wi", self.wi_NFD), ("wo", self.wo_NDF)):
                    weight = self._linear(module, name)
                    stacked[place].copy_(weight)
                    weight.data = stacked[place]

    @staticmethod
    def _linear(expert: nn.Module, name: str) -> nn.Parameter:
        return expert.get_parameter(f"{name}.weight")

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return self.wi_NFD[0].nbytes + self.wo_NDF[0].nbytes

    @property
    def places(self) -> IntArray:
        """The place in force of each slot, `[P]`."""
        return self._first + self._in_force

    def block(self, device: int) -> slice:
        """The places of one device."""
        size = len(self.wi_NFD) // self.num_devices
        return slice(device * size, (device + 1) * size)

    @torch.no_grad()
    def write(self, move: SlotMove) -> None:
        """Copies an expert from its home into the spare place of a replica slot; takes effect at `commit`."""
        assert not self.is_home_P[move.slot], f"slot {move.slot} is a home"
        source, target = int(self.places[move.source]), int(self._first[move.slot] + 1 - self._in_force[move.slot])
        self.wi_NFD[target].copy_(self.wi_NFD[source], non_blocking=True)
        self.wo_NDF[target].copy_(self.wo_NDF[source], non_blocking=True)

    def commit(self, slots: Iterable[int]) -> None:
        """Switches the written slots over to their other place."""
        for slot in slots:
            self._in_force[slot] ^= 1

    def release(self) -> None:
        """Gives the model's experts storage of their own again, bit for bit what it was."""
        for module in self._experts:
            for name in ("wi", "wo"):
                weight = self._linear(module, name)
                weight.data = weight.data.clone()
