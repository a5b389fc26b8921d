"""The word between planner and runtime: which logical expert each slot holds, in every MoE layer.

`phy2log` is the truth; every other map is derived from it. Slots are numbered device after device in equal blocks.
In a plan with fixed homes, each block begins with E / G home slots, which never change, and ends with R / G replica
slots, where -1 is an empty one:

    2 devices, 4 experts, 2 redundant: device 0 holds [0, 1 | 3], device 1 holds [2, 3 | -1];
    phy2log = [[0, 1, 3, 2, 3, -1]]

Shape suffixes: L MoE layers, E logical experts, R redundant experts, P = E + R slots, G devices.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from data.arrays import BoolArray, IntArray

EMPTY = -1


@dataclass(frozen=True)
class SlotMove:
    """One expert's weights to be written into one slot.

    Attributes:
        layer: Index of the MoE layer, 0..L-1.
        slot: The slot that is overwritten, 0..P-1.
        expert: The logical expert it will hold.
        source: The slot its weights are read from: the expert's home where the plan has fixed homes.
    """

    layer: int
    slot: int
    expert: int
    source: int


@dataclass(frozen=True, eq=False)
class ReplicationPlan:
    """Where every copy of every expert lies.

    Attributes:
        phy2log: Logical expert in each slot, or -1 where a slot is empty, int64 `[L, P]`.
        num_devices: G; device g owns slots `g * P / G` to `(g + 1) * P / G - 1`.

    Raises:
        ValueError: If slots do not divide over devices, or an expert has no slot in some layer.
    """

    phy2log: IntArray
    num_devices: int

    def __post_init__(self) -> None:
        phy2log = np.ascontiguousarray(self.phy2log, dtype=np.int64)
        if phy2log.ndim != 2 or phy2log.size == 0:
            raise ValueError(f"phy2log has shape {phy2log.shape}, expected [layers, slots] with at least one of each")
        if self.num_devices < 1 or phy2log.shape[1] % self.num_devices:
            raise ValueError(
                f"{phy2log.shape[1]} slots do not divide over {self.num_devices} devices; "
                "choose redundant experts so that experts + redundant is a multiple of the devices"
            )
        if phy2log.min() < EMPTY:
            raise ValueError(f"phy2log holds {phy2log.min()}, expected expert ids from 0, or -1 for an empty slot")
        num_experts = int(phy2log.max()) + 1
        held = np.zeros((len(phy2log), num_experts + 1), dtype=bool)  # the last column takes the empty slots
        held[np.arange(len(phy2log))[:, None], phy2log] = True
        if not held[:, :num_experts].all():
            layer, expert = np.argwhere(~held[:, :num_experts])[0]
            raise ValueError(f"layer {layer} has no slot for expert {expert}; every expert needs at least one")
        phy2log.setflags(write=False)
        object.__setattr__(self, "phy2log", phy2log)

    @classmethod
    def at_home(cls, homes: IntArray, num_devices: int, num_redundant: int) -> "ReplicationPlan":
        """The plan with every expert at home and all replica slots empty.

        Args:
            homes: Experts in the order of the home slots, device after device, `[L, E]`: see `contiguous_homes`
                and `flat_homes`.
            num_devices: G.
            num_redundant: R, replica slots a layer over all devices.
        """
        check_division(homes.shape[-1], num_devices, num_redundant)
        if num_redundant > (most := homes.shape[-1] * num_devices):
            raise ValueError(
                f"{num_redundant} redundant experts are more than a copy of each of {homes.shape[-1]} experts on every "
                f"one of {num_devices} devices; choose {most} at most"
            )
        blocks = homes.reshape(len(homes), num_devices, -1)
        empty = np.full((*blocks.shape[:2], num_redundant // num_devices), EMPTY)
        return cls(np.concatenate([blocks, empty], axis=-1).reshape(len(homes), -1), num_devices)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.phy2log.max()) + 1

    @property
    def num_redundant(self) -> int:
        """R."""
        return int(self.phy2log.shape[1]) - self.num_experts

    @property
    def slots_per_device(self) -> int:
        """P / G."""
        return int(self.phy2log.shape[1]) // self.num_devices

    @cached_property
    def is_home_slot(self) -> BoolArray:
        """True for the first E / G slots of each device, `[P]`."""
        position = np.arange(self.phy2log.shape[1]) % self.slots_per_device
        return position < self.num_experts // self.num_devices

    @cached_property
    def homes(self) -> IntArray:
        """The home slot of each expert, `[L, E]`.

        Raises:
            ValueError: If the home slots do not hold each expert once, as in a plan made by EPLB.
        """
        slots = np.flatnonzero(self.is_home_slot)
        homes = np.full((len(self.phy2log), self.num_experts + 1), EMPTY)  # the last column takes the empty slots
        np.put_along_axis(homes, self.phy2log[:, slots], slots[None], axis=-1)
        if (homes[:, :-1] == EMPTY).any():
            raise ValueError("this plan has no fixed homes: an expert is in no device's first E / G slots")
        return homes[:, :-1]

    @cached_property
    def copies(self) -> IntArray:
        """Number of slots that hold each expert, `[L, E]`."""
        return np.stack([np.bincount(row[row >= 0], minlength=self.num_experts) for row in self.phy2log])

    def device_of(self, slot: int) -> int:
        """The device that owns a slot."""
        return slot // self.slots_per_device

    def moves_to(self, other: "ReplicationPlan") -> list[SlotMove]:
        """The weights to be written, by layer and slot, to get from this plan to another of the same shape."""
        if other.phy2log.shape != self.phy2log.shape or other.num_devices != self.num_devices:
            raise ValueError(
                f"plans differ in shape: {self.phy2log.shape} on {self.num_devices} devices, "
                f"{other.phy2log.shape} on {other.num_devices}"
            )
        changed = (self.phy2log != other.phy2log) & (other.phy2log != EMPTY)
        moves = []
        for layer, slot in np.argwhere(changed).tolist():
            expert = int(other.phy2log[layer, slot])
            held = np.flatnonzero(self.phy2log[layer] == expert)
            at_home = held[self.is_home_slot[held]]
            moves.append(SlotMove(layer, slot, expert, source=int((at_home if at_home.size else held)[0])))
        return moves


def check_division(num_experts: int, num_devices: int, num_redundant: int) -> None:
    """Refuses experts or redundant experts that do not divide over the devices.

    Raises:
        ValueError: Naming the figure that does not divide.
    """
    if num_devices < 1:
        raise ValueError(f"{num_devices} devices: expected at least 1")
    if num_experts % num_devices:
        raise ValueError(f"{num_experts} experts do not divide over {num_devices} devices; choose a divisor")
    if num_redundant < 0 or num_redundant % num_devices:
        raise ValueError(
            f"{num_redundant} redundant experts do not divide over {num_devices} devices; "
            f"choose 0 or a multiple of {num_devices}"
        )


def contiguous_homes(num_layers: int, num_experts: int) -> IntArray:
    """Experts in their own order, as a model without balancing lays them out, `[L, E]`."""
    return np.tile(np.arange(num_experts), (num_layers, 1))


def flat_homes(load: npt.NDArray[np.float64], num_devices: int) -> IntArray:
    """Homes that give every device E / G experts and about the same load.

    Longest processing time first: experts from the most to the least loaded, each to the least loaded device that
    still has a home slot free (Graham 1969).

    Args:
        load: Load or share known so far, `[L, E]`.
        num_devices: G.

    Returns:
        Experts in the order of the home slots, device after device, `[L, E]`; within a device in their own order.
    """
    num_layers, num_experts = load.shape
    check_division(num_experts, num_devices, 0)
    return np.stack([_pack(row, num_devices, num_experts // num_devices) for row in load]).reshape(num_layers, -1)


def _pack(load: npt.NDArray[np.float64], num_devices: int, room: int) -> IntArray:
    """Packs one layer's experts `[E]` into devices, `[G, room]`."""
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    weight = np.zeros(num_devices)
    for expert in np.argsort(-load, kind="stable").tolist():
        device = min((g for g in range(num_devices) if len(devices[g]) < room), key=lambda g: (weight[g], g))
        devices[device].append(expert)
        weight[device] += load[expert]
    return np.array([sorted(experts) for experts in devices])
