"""ReplicationPlan: the logical expert held by every physical slot, for each MoE layer; SlotMove; initial placements.

The planner produces a plan, the engine applies it. `phy2log` is the only stored map; every other map is derived from
it. Slots are numbered device after device in equal blocks. In a plan with homes, every expert has one home slot; the
other slots are replica slots, where -1 is an empty slot. Homes are fixed from plan to plan, unless the planner moves
them (`HomePlanner.moving_homes`). Where experts and redundant experts both divide over the devices, each block begins
with E / G home slots and ends with R / G replica slots, until homes move:

    2 devices, 4 experts, 2 redundant: device 0 holds [0, 1 | 3], device 1 holds [2, 3 | -1];
    phy2log = [[0, 1, 3, 2, 3, -1]]

Otherwise `home_slots` says which slots are homes, and a device may have no replica slot, or no home:

    3 devices, 4 experts, 2 redundant: device 0 holds [0 | -1], device 1 holds [1 | 3], device 2 holds [2, 3];
    phy2log = [[0, -1, 1, 3, 2, 3]], home_slots = [[0, 2, 4, 5]]

`contiguous_homes` and `flat_homes` choose which expert has its home where.

Shape suffixes: L MoE layers, E logical experts, R redundant experts, P = E + R slots, G devices, X copies of the expert
with most copies.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.arrays import BoolArray, FloatArray, IntArray
from runtime.balancing.nodes import check_groups
from runtime.balancing.packing import pack_equally, pack_with_replicas

EMPTY = -1


@dataclass(frozen=True)
class SlotMove:
    """One expert's weights to be written into one slot.

    Attributes:
        layer: Index of the MoE layer, 0..L-1.
        slot: The slot that is overwritten, 0..P-1.
        expert: The logical expert it will hold.
        source: The slot its weights are read from: the expert's home in the plan before, where that plan has homes.
    """

    layer: int
    slot: int
    expert: int
    source: int


@dataclass(frozen=True, eq=False)
class ReplicationPlan:
    """The expert in every slot of every MoE layer, and the maps derived from that.

    Example:
        >>> plan = ReplicationPlan(np.array([[0, 1, 3, 2, 3, -1]]), num_devices=2)
        >>> plan.replica_count.tolist()
        [[1, 1, 1, 2]]
        >>> plan.log2phy.tolist()
        [[[0, -1], [1, -1], [3, -1], [2, 4]]]
        >>> plan.moves_to(ReplicationPlan(np.array([[0, 1, 3, 2, 3, 0]]), num_devices=2))
        [SlotMove(layer=0, slot=5, expert=0, source=0)]

    Attributes:
        phy2log: Logical expert in each slot, or -1 where a slot is empty, int64 `[L, P]`.
        num_devices: G; device g owns slots `g * P / G` to `(g + 1) * P / G - 1`.
        home_slots: Home slot of each expert, `[L, E]`; None where the homes are the first E / G slots of each device.

    Raises:
        ValueError: If slots do not divide over devices, an expert has no slot in some layer, or a home slot holds
            another expert.
    """

    phy2log: IntArray
    num_devices: int
    home_slots: IntArray | None = None

    def __post_init__(self) -> None:
        if (kind := np.asarray(self.phy2log).dtype).kind not in "iu":
            raise ValueError(f"phy2log has dtype {kind}, expected whole numbers: the logical expert in each slot")
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
        held = np.zeros((len(phy2log), num_experts + 1), dtype=bool)  # index -1, the last column, takes empty slots
        held[np.arange(len(phy2log))[:, None], phy2log] = True
        if not held[:, :num_experts].all():
            layer, expert = np.argwhere(~held[:, :num_experts])[0]
            raise ValueError(f"layer {layer} has no slot for expert {expert}; every expert needs at least one")
        phy2log.setflags(write=False)
        object.__setattr__(self, "phy2log", phy2log)
        if self.home_slots is not None:
            object.__setattr__(self, "home_slots", _checked_homes(self.home_slots, phy2log, num_experts))

    @classmethod
    def at_home(cls, homes: IntArray, num_devices: int, num_redundant_experts: int) -> "ReplicationPlan":
        """The plan with every expert at home and all replica slots empty.

        Args:
            homes: As `contiguous_homes` and `flat_homes` return them: experts in the order of the home slots, device
                after device, `[L, E]`, which gives every device E / G homes, or one more or less where that is no whole
                number; or the expert of every home slot and -1 in every replica slot, `[L, P]`.
            num_devices: G.
            num_redundant_experts: R, replica slots a layer over all devices.

        Raises:
            ValueError: If a row does not hold every expert once, or the numbers do not divide.
        """
        homes = np.asarray(homes)
        num_experts = int(homes.max()) + 1 if homes.ndim == 2 and homes.size else 0
        whole = np.sort(homes, axis=-1)[:, -num_experts:] if num_experts else homes
        widths = (num_experts, num_experts + num_redundant_experts)
        if not num_experts or homes.shape[1] not in widths or (whole != np.arange(num_experts)).any():
            raise ValueError(
                "homes must be [layers, experts], each row a permutation of the experts, or [layers, slots], each row "
                f"with every expert once and -1 in the other slots; got shape {homes.shape}"
            )
        check_division(num_experts, num_devices, num_redundant_experts)
        if num_redundant_experts > (most := num_experts * num_devices):
            raise ValueError(
                f"{num_redundant_experts} redundant experts are more than a copy of each of {num_experts} experts "
                f"on every one of {num_devices} devices; choose {most} at most"
            )
        equal = num_experts % num_devices == 0
        if homes.shape[1] == num_experts:
            phy2log = _spread(homes, num_devices, num_redundant_experts)
        else:
            phy2log = homes
            equal = equal and np.array_equal(
                phy2log >= 0, _spread(phy2log[:, :num_experts], num_devices, num_redundant_experts) >= 0
            )
        return cls(
            phy2log, num_devices, None if equal else np.argsort(phy2log, axis=-1, kind="stable")[:, -num_experts:]
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.phy2log.max()) + 1

    @property
    def num_redundant_experts(self) -> int:
        """R."""
        return int(self.phy2log.shape[1]) - self.num_experts

    @property
    def slots_per_device(self) -> int:
        """P / G."""
        return int(self.phy2log.shape[1]) // self.num_devices

    @cached_property
    def is_home_slot(self) -> BoolArray:
        """True for home slots, `[L, P]`: where `home_slots` is None, for the first E / G slots of each device."""
        if self.home_slots is None:
            position = np.arange(self.phy2log.shape[1]) % self.slots_per_device
            return np.tile(position < self.num_experts // self.num_devices, (len(self.phy2log), 1))
        is_home_slot = np.zeros(self.phy2log.shape, dtype=bool)
        np.put_along_axis(is_home_slot, self.home_slots, True, axis=-1)
        return is_home_slot

    @cached_property
    def homes(self) -> IntArray:
        """The home slot of each expert, `[L, E]`.

        Raises:
            ValueError: If the home slots do not hold each expert once, as in a plan made by EPLB.
        """
        if self.home_slots is not None:
            return self.home_slots
        slots = np.flatnonzero(self.is_home_slot[0])
        homes = np.full(
            (len(self.phy2log), self.num_experts + 1), EMPTY
        )  # index -1, the last column, takes empty slots
        np.put_along_axis(homes, self.phy2log[:, slots], slots[None], axis=-1)
        if (homes[:, :-1] == EMPTY).any():
            raise ValueError("this plan has no fixed homes: an expert is in no device's first E / G slots")
        return homes[:, :-1]

    def with_slots(self, phy2log: IntArray) -> "ReplicationPlan":
        """The plan with the same devices and homes, and other replicas: `phy2log` is `[L, P]`."""
        return ReplicationPlan(phy2log, self.num_devices, self.home_slots)

    @cached_property
    def replica_count(self) -> IntArray:
        """Slots that hold each expert, its home included, `[L, E]`."""
        return np.stack([np.bincount(row[row >= 0], minlength=self.num_experts) for row in self.phy2log])

    @cached_property
    def log2phy(self) -> IntArray:
        """Slots of each expert in ascending order, padded with -1, `[L, E, X]`: EPLB's second map."""
        log2phy = np.full((*self.replica_count.shape, int(self.replica_count.max())), EMPTY)
        for layer, row in enumerate(self.phy2log):
            slots = np.argsort(row, kind="stable")[np.count_nonzero(row == EMPTY) :]  # by expert, then by slot
            experts = row[slots]
            nth = np.arange(len(slots)) - np.searchsorted(experts, experts)  # experts [0, 3, 3, 3] -> [0, 0, 1, 2]
            log2phy[layer, experts, nth] = slots
        return log2phy

    def device_of(self, slot: int) -> int:
        """The device that owns a slot."""
        return slot // self.slots_per_device

    def moves_to(self, other: "ReplicationPlan") -> list[SlotMove]:
        """The weights to write, by layer and slot, to get from this plan to another of the same shape."""
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
            at_home = held[self.is_home_slot[layer, held]]
            moves.append(SlotMove(layer, slot, expert, source=int((at_home if at_home.size else held)[0])))
        return moves

    def filled(self) -> "ReplicationPlan":
        """The plan without empty slots, for engines that know none.

        Each empty slot, in ascending order, gets the expert with the fewest copies among the experts that its device
        does not hold yet; of equals, the one with the lowest number.
        """
        phy2log = self.phy2log.copy()
        count = self.replica_count.copy()
        for layer, slot in np.argwhere(phy2log == EMPTY).tolist():
            first = self.device_of(slot) * self.slots_per_device
            held = phy2log[layer, first : first + self.slots_per_device]
            missing = np.setdiff1d(np.arange(self.num_experts), held)
            choice = missing if missing.size else np.arange(self.num_experts)
            expert = choice[np.argmin(count[layer, choice])]
            phy2log[layer, slot] = expert
            count[layer, expert] += 1
        return self.with_slots(phy2log)


def check_division(num_experts: int, num_devices: int, num_redundant_experts: int) -> None:
    """Refuses experts and redundant experts whose slots do not divide over the devices.

    Raises:
        ValueError: Naming the figures, and redundant experts that would divide.
    """
    if num_devices < 1:
        raise ValueError(f"{num_devices} devices: expected at least 1")
    if num_redundant_experts < 0:
        raise ValueError(f"{num_redundant_experts} redundant experts: expected 0 or more")
    if odd := (num_experts + num_redundant_experts) % num_devices:
        most = (num_devices - 1) * num_experts  # every device holds every expert
        near = [num_redundant_experts - odd, num_redundant_experts - odd + num_devices]
        choice = [str(redundant) for redundant in near if 0 <= redundant <= most] or [f"at most {most}"]
        raise ValueError(
            f"{num_experts} experts and {num_redundant_experts} redundant experts do not divide over {num_devices} "
            f"devices; choose {' or '.join(choice)} redundant experts"
        )


def contiguous_homes(num_layers: int, num_experts: int) -> IntArray:
    """Experts in their own order, as a model without balancing lays them out, `[L, E]`."""
    return np.tile(np.arange(num_experts), (num_layers, 1))


def flat_homes(
    load: FloatArray,
    num_devices: int,
    num_redundant_experts: int | None = None,
    *,
    num_groups: int | None = None,
    devices_per_node: int | None = None,
) -> IntArray:
    """Homes that give every device about the same load, and replica slots where they help.

    Where experts divide over devices: longest processing time first, experts from the most to the least loaded, each to
    the least loaded device that still has a free home slot (Graham 1969). Otherwise the slots are packed as EPLB packs
    them: the expert with most load per copy is copied until all slots are used, and the copies are packed in the same
    way. One copy of each expert is its home, and the slots of the further copies are the replica slots: they lie on
    devices that have room for a hot expert's tokens.

    With groups of experts, whole groups are packed onto the nodes in the same way, as many on each, and then the
    experts of each node onto its devices.

    Args:
        load: Load or share known so far, `[L, E]`.
        num_devices: G.
        num_redundant_experts: R; needed where experts do not divide over devices.
        num_groups: Groups of consecutive experts that stay on one node; None is none.
        devices_per_node: Devices of a node; needed with groups.

    Returns:
        Homes for `ReplicationPlan.at_home`: `[L, E]` where experts divide over the devices, within a device in their
        own order; else `[L, P]`.
    """
    redundant = num_redundant_experts or 0
    check_division(load.shape[1], num_devices, redundant)
    check_groups(num_groups, num_devices, devices_per_node, load.shape[1])
    load = np.ascontiguousarray(load, dtype=np.float64)
    if num_groups is not None and devices_per_node is not None:
        return _grouped_homes(load, num_devices // devices_per_node, devices_per_node, redundant, num_groups)
    if load.shape[1] % num_devices == 0:
        return pack_equally(load, num_devices)
    return pack_with_replicas(load, num_devices, redundant)


def _grouped_homes(load: FloatArray, nodes: int, devices: int, num_redundant: int, num_groups: int) -> IntArray:
    """`flat_homes` of groups onto nodes, and of each node's experts onto its devices."""
    (layers, num_experts), size = load.shape, load.shape[1] // num_groups
    groups = pack_equally(load.reshape(layers, num_groups, size).sum(-1), nodes)
    experts = (groups[..., None] * size + np.arange(size)).reshape(layers, num_experts)
    rows = flat_homes(
        np.take_along_axis(load, experts, axis=-1).reshape(layers * nodes, -1), devices, num_redundant // nodes
    )
    held = np.take_along_axis(experts.reshape(layers * nodes, -1), rows, axis=-1)
    return np.where(rows == EMPTY, EMPTY, held).reshape(layers, -1)


def _spread(homes: IntArray, num_devices: int, num_redundant_experts: int) -> IntArray:
    """Experts in the order of the home slots `[L, E]` at the first slots of the devices, -1 elsewhere, `[L, P]`.

    Device g gets the experts from `g * E // G` to `(g + 1) * E // G` of that order.
    """
    num_layers, num_experts = homes.shape
    slots_per_device = (num_experts + num_redundant_experts) // num_devices
    phy2log = np.full((num_layers, num_devices * slots_per_device), EMPTY)
    first = np.arange(num_devices + 1) * num_experts // num_devices
    device = np.repeat(np.arange(num_devices), np.diff(first))
    phy2log[:, device * slots_per_device + np.arange(num_experts) - first[device]] = homes
    return phy2log


def _checked_homes(home_slots: IntArray, phy2log: IntArray, num_experts: int) -> IntArray:
    """Home slots as read-only int64 `[L, E]`, refused unless each holds its expert."""
    homes = np.ascontiguousarray(home_slots, dtype=np.int64)
    if homes.shape != (len(phy2log), num_experts) or homes.min() < 0 or homes.max() >= phy2log.shape[1]:
        raise ValueError(
            f"home_slots has shape {homes.shape}, expected {(len(phy2log), num_experts)}, a slot for each expert"
        )
    if (wrong := np.take_along_axis(phy2log, homes, axis=-1) != np.arange(num_experts)).any():
        layer, expert = np.argwhere(wrong)[0]
        raise ValueError(f"layer {layer}: the home slot of expert {expert} holds another expert")
    homes.setflags(write=False)
    return homes
