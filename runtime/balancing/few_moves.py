"""Placement for engines that split an expert's tokens evenly over its copies, with few moves: `rebalance`.

EPLB solves each placement anew. Here two placements are improved step by step, the current one and EPLB's own (its
devices numbered so that most experts stay), and the better one is taken: the smallest largest device load, where each
move has a price. Every step relieves the most loaded device, by exchanging two experts or by one more copy of a hot
expert, in place of a copy that another expert can spare. No device holds an expert twice.

    >>> rebalance(np.array([[60.0, 10, 10, 20]]), 6, 2, np.array([[0, 1, 2, 3, 1, 2]])).tolist()
    [[0, 1, 3, 3, 0, 2]]

Expert 0 takes 60 of 100 tokens. Two moves, second copies of experts 0 and 3 where experts 1 and 2 have copies to spare,
bring the devices from 70 and 30 to 50 and 50.

Shape suffixes: L MoE layers, E logical experts, P slots, G devices.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from data.arrays import BoolArray, FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.eplb import check_numbers, place_experts
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.planner import LEAST_GAIN

MOST_STEPS = 4
"""Steps of a search, in units of the slots of a layer."""


def rebalance(
    weight: FloatArray,
    num_slots: int,
    num_devices: int,
    current: IntArray | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> IntArray:
    """Expert in each slot, int64 `[L, P]`.

    Args:
        weight: Load of each expert, `[L, E]`.
        num_slots: P, a multiple of the devices.
        num_devices: G.
        current: Expert in each slot now, -1 in an empty one, `[L, P]`; None where nothing is placed yet.
        num_groups: Groups that the router chooses experts by. If a multiple of `num_nodes`, experts move within their
            node only, as in EPLB's hierarchical policy.
        num_nodes: Nodes, each with as many devices.

    Raises:
        ValueError: If the weights are not loads `[L, E]`, or the numbers do not fit.
    """
    weight = np.ascontiguousarray(weight, dtype=np.float64)
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight has shape {weight.shape}, expected [layers, experts] with at least one of each")
    if not np.isfinite(weight).all() or weight.min() < 0:
        raise ValueError("weight has NaN, infinite or negative entries; expected the load of each expert")
    num_layers, num_experts = weight.shape
    check_numbers(num_experts, num_slots, num_groups, num_nodes, num_devices)
    if num_slots // num_devices > num_experts:
        raise ValueError(
            f"{num_slots // num_devices} slots a device are more than the {num_experts} experts; choose at most "
            f"{(num_devices - 1) * num_experts} redundant experts"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    fresh = place_experts(weight, num_slots, num_groups, num_nodes, num_devices)
    if current is None:
        current = np.full((num_layers, 0), -1, dtype=np.int64)
    elif current.shape != (num_layers, num_slots):
        raise ValueError(f"the current placement has shape {current.shape}, expected {(num_layers, num_slots)}")
    elif current.min() < -1 or current.max() >= num_experts:
        raise ValueError(
            f"the current placement holds {current.min()} to {current.max()}, expected -1 to {num_experts - 1}"
        )
    return _rebalance(weight, fresh, np.ascontiguousarray(current, dtype=np.int64), num_devices, num_nodes)


@dataclass(frozen=True)
class FewMovesPlanner:
    """`rebalance` for every forecast; its plans have no fixed homes.

    Attributes:
        num_groups: As in `rebalance`.
        num_nodes: As in `rebalance`.
    """

    num_groups: int = 1
    num_nodes: int = 1

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.balancing.planner.Planner`."""
        slots, devices = current.phy2log.shape[1], current.num_devices
        placed = rebalance(forecast.load, slots, devices, current.phy2log, self.num_groups, self.num_nodes)
        return ReplicationPlan(placed, devices)


@njit(cache=True, nogil=True)
def _rebalance(
    weight_LE: FloatArray, fresh_LP: IntArray, current_LP: IntArray, num_devices: int, num_nodes: int
) -> IntArray:
    placed = np.empty_like(fresh_LP)
    for layer in range(len(fresh_LP)):
        load, current, fresh = weight_LE[layer], current_LP[layer], fresh_LP[layer].copy()
        price = LEAST_GAIN * load.sum() / num_devices
        if current.size == 0:
            _fill(fresh, load, num_devices, num_nodes)
            placed[layer], _ = _search(fresh, fresh, load, num_devices, num_nodes, 0.0)
            continue
        fresh = _renumbered(fresh, current, num_devices, num_nodes)
        _fill(fresh, load, num_devices, num_nodes)
        placed[layer], cost = _search(fresh, current, load, num_devices, num_nodes, price)
        held = np.zeros(load.size, dtype=np.bool_)
        for expert in current:
            if expert >= 0:
                held[expert] = True
        if held.all():
            start = current.copy()
            _fill(start, load, num_devices, num_nodes)
            other, other_cost = _search(start, current, load, num_devices, num_nodes, price)
            if other_cost <= cost:
                placed[layer] = other
    return placed


@njit(cache=True, nogil=True)
def _renumbered(fresh: IntArray, current: IntArray, num_devices: int, num_nodes: int) -> IntArray:
    """A placement on the devices that hold most of its experts already, which keep their slots; nodes stay.

    With current [0, 1 | 2, 3], the fresh [3, 2 | 1, 0] becomes [0, 1 | 2, 3]: nothing moves.
    """
    size, per_node = fresh.size // num_devices, num_devices // num_nodes
    common = np.zeros((num_devices, num_devices), dtype=np.int64)  # of a fresh device with a current one
    for new in range(num_devices):
        for old in range(num_devices):
            if new // per_node == old // per_node:
                for expert in fresh[new * size : (new + 1) * size]:
                    common[new, old] += (current[old * size : (old + 1) * size] == expert).any()
            else:
                common[new, old] = -1
    result = np.full(fresh.size, -1, dtype=np.int64)
    for _ in range(num_devices):
        best = int(np.argmax(common))
        new, old = best // num_devices, best % num_devices
        common[new, :] = -2
        common[:, old] = -2
        rest = fresh[new * size : (new + 1) * size].copy()
        for slot in range(old * size, (old + 1) * size):
            for i in range(size):
                if rest[i] >= 0 and rest[i] == current[slot]:
                    result[slot], rest[i] = rest[i], -1
                    break
        i = 0
        for slot in range(old * size, (old + 1) * size):
            if result[slot] < 0:
                while rest[i] < 0:
                    i += 1
                result[slot] = rest[i]
                i += 1
    return result


@njit(cache=True, nogil=True)
def _fill(slots: IntArray, load: FloatArray, num_devices: int, num_nodes: int) -> None:
    """Gives each empty slot, or one with a second copy, the expert with most load a copy that its device lacks.

    Experts of the slot's own node come first.
    """
    size, node_size = slots.size // num_devices, slots.size // num_nodes
    count = np.zeros(load.size, dtype=np.int64)
    for slot in range(slots.size):
        first = slot // size * size
        if slots[slot] >= 0 and (slots[first:slot] == slots[slot]).any():
            slots[slot] = -1
        if slots[slot] >= 0:
            count[slots[slot]] += 1
    for slot in range(slots.size):
        if slots[slot] < 0:
            first, node = slot // size * size, slot // node_size * node_size
            best, best_near = -1, False
            for expert in range(load.size):
                if (slots[first : first + size] == expert).any():
                    continue
                near = (slots[node : node + node_size] == expert).any()
                more = best < 0 or load[expert] * (count[best] + 1) > load[best] * (count[expert] + 1)
                if (near and not best_near) or (near == best_near and more):
                    best, best_near = expert, near
            slots[slot] = best
            count[best] += 1


@njit(cache=True, nogil=True)
def _search(
    start: IntArray, current: IntArray, load_E: FloatArray, num_devices: int, num_nodes: int, price: float
) -> tuple[IntArray, float]:
    """The placement of least cost on the way downhill from `start`, and that cost: largest device load and moves."""
    slots, size = start.copy(), start.size // num_devices
    count = np.bincount(slots, minlength=load_E.size)
    holds = np.zeros((num_devices, load_E.size), dtype=np.bool_)
    device_load = np.zeros(num_devices)
    for slot in range(slots.size):
        holds[slot // size, slots[slot]] = True
        device_load[slot // size] += load_E[slots[slot]] / count[slots[slot]]
    best, mean = slots.copy(), load_E.sum() / num_devices
    least = device_load.max() + price * (slots != current).sum()
    for _ in range(MOST_STEPS * slots.size):
        source, target, copies = _best_step(slots, load_E, count, holds, device_load, num_devices // num_nodes)
        if source < 0:
            break
        _step(slots, load_E, count, holds, device_load, source, target, copies)
        moves = price * (slots != current).sum()
        if device_load.max() + moves < least:
            best, least = slots.copy(), device_load.max() + moves
        if mean + moves >= least:  # no later placement can be better
            break
    return best, least


@njit(cache=True, nogil=True)
def _best_step(
    slots: IntArray, load_E: FloatArray, count: IntArray, holds: BoolArray, device_load: FloatArray, per_node: int
) -> tuple[int, int, bool]:
    """The step that lowers the sum of squared device loads most for a move: source, target, and whether it copies.

    The source is a slot of the most loaded device. The step exchanges its expert with the target's, which is two moves,
    or copies it to the target, whose expert has a copy to spare. Source -1: no step lowers the sum.
    """
    num_devices = device_load.size
    hot, size = np.argmax(device_load), slots.size // num_devices
    best, source, target, copies = 1e-9 * device_load[hot] ** 2, -1, -1, False
    for a in range(hot * size, (hot + 1) * size):
        x = slots[a]
        share = load_E[x] / count[x]
        for b in range(slots.size):
            device, y = b // size, slots[b]
            if device == hot or device // per_node != hot // per_node or holds[device, x]:
                continue
            other = load_E[y] / count[y]
            if not holds[hot, y]:
                gain = (share - other) * (device_load[hot] - device_load[device] - (share - other))
                if gain > best:
                    best, source, target, copies = gain, a, b, False
            if count[y] > 1:
                gain = 0.0
                for d in range(num_devices):
                    change = _change(d, device, holds[d, x], holds[d, y], load_E[x], count[x], load_E[y], count[y])
                    gain -= change * (2 * device_load[d] + change)
                if gain > best:
                    best, source, target, copies = gain, a, b, True
    return source, target, copies


@njit(cache=True, nogil=True)
def _change(
    device: int, target: int, has_x: bool, has_y: bool, load_x: float, count_x: int, load_y: float, count_y: int
) -> float:
    """What a device's load changes by when a copy of x takes the place of a copy of y on the target device."""
    if device == target:
        return load_x / (count_x + 1) - load_y / count_y
    change = 0.0
    if has_x:
        change -= load_x / count_x - load_x / (count_x + 1)
    if has_y:
        change += load_y / (count_y - 1) - load_y / count_y
    return change


@njit(cache=True, nogil=True)
def _step(
    slots: IntArray, load_E: FloatArray, count: IntArray, holds: BoolArray, device_load: FloatArray, source: int,
    target: int, copies: bool,
) -> None:  # fmt: skip
    """Takes a step of `_best_step`."""
    size = slots.size // device_load.size
    hot, device, x, y = source // size, target // size, slots[source], slots[target]
    if copies:
        for d in range(device_load.size):
            device_load[d] += _change(d, device, holds[d, x], holds[d, y], load_E[x], count[x], load_E[y], count[y])
        count[x] += 1
        count[y] -= 1
    else:
        shifted = load_E[x] / count[x] - load_E[y] / count[y]
        device_load[hot] -= shifted
        device_load[device] += shifted
        slots[source], holds[hot, x], holds[hot, y] = y, False, True
    slots[target], holds[device, y], holds[device, x] = x, False, True
