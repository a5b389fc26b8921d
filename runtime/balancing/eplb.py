"""EPLB in our own implementation: `rebalance_experts` with DeepSeek's signature, and the planners we compare with.

EPLB solves the placement anew from summed loads, for an even split. Written from the published description of its two
policies (github.com/deepseek-ai/EPLB):

- global: copy the expert with most load per copy until all slots are used, then pack the copies, heaviest first, each
  into the device with least load that still has a free slot;
- hierarchical, where the expert groups divide over the nodes: pack whole groups onto nodes in the same way, then apply
  the global policy within each node, so that a token routed to few groups visits few nodes.

Shape suffixes: L MoE layers, E logical experts, P slots, G devices, N items to pack, X copies of the expert with most
copies.
"""

import sys
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from data.arrays import FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.packing import replicate
from runtime.balancing.plan import ReplicationPlan

Array = TypeVar("Array")


def rebalance_experts(
    weight: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Array, Array, Array]:
    """Places expert copies by EPLB's policies, with EPLB's arguments and results.

    It is for engines that split an expert's tokens evenly over its copies. Where the engine can split by exact counts,
    `Balancer` with `split_by_quota` balances better and moves less. On the recorded gpt-oss-20b loads of the tests (8
    devices, 16 redundant experts, planned from a moving average), balancedness is .750 with 42.7 moves a layer and step
    for EPLB with an even split, and .966 with 0.8 moves for `Balancer`.

    Example:
        >>> phy2log, log2phy, logcnt = rebalance_experts(np.array([[90, 48, 10, 10]]), 6, 1, 1, 2)
        >>> phy2log.tolist(), logcnt.tolist()
        ([[0, 1, 2, 0, 1, 3]], [[2, 2, 1, 1]])

    Args:
        weight: Load of each expert, `[L, E]`: numpy array or torch tensor.
        num_replicas: P, slots of a layer over all GPUs; a multiple of `num_gpus`.
        num_groups: Groups that the router chooses experts by. If a multiple of `num_nodes`, the hierarchical policy is
            used, else the global one.
        num_nodes: Nodes, each with `num_gpus / num_nodes` GPUs.
        num_gpus: G.

    Returns:
        phy2log: Expert in each slot, `[L, P]`.
        log2phy: Slots of each expert in ascending order, padded with -1, `[L, E, X]`.
        logcnt: Copies of each expert, `[L, E]`.
        They are int64; torch tensors on the CPU if `weight` is a tensor, else numpy arrays.

    Raises:
        ValueError: If the weights are not loads `[L, E]`, or the numbers do not divide.
    """
    torch: Any = sys.modules.get("torch")  # where it was never imported, nothing can be its tensor
    tensor = torch is not None and isinstance(weight, torch.Tensor)
    load = np.asarray(cast(Any, weight).detach().cpu().double() if tensor else weight, dtype=np.float64)
    if load.ndim != 2 or load.size == 0:
        raise ValueError(f"weight has shape {load.shape}, expected [layers, experts] with at least one of each")
    if not np.isfinite(load).all() or load.min() < 0:
        raise ValueError("weight has NaN, infinite or negative entries; expected the load of each expert")
    check_numbers(load.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    plan = ReplicationPlan(place_experts(load, num_replicas, num_groups, num_nodes, num_gpus), num_gpus)
    maps = (plan.phy2log.copy(), plan.log2phy, plan.replica_count)
    return cast(tuple[Array, Array, Array], tuple(map(torch.from_numpy, maps)) if tensor else maps)


def check_numbers(num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    """Refuses numbers of a placement that do not divide.

    Raises:
        ValueError: Naming the numbers.
    """
    for name, value in (("num_groups", num_groups), ("num_nodes", num_nodes), ("num_gpus", num_gpus)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if num_experts % num_groups:
        raise ValueError(f"{num_experts} experts do not divide over num_groups={num_groups}; choose a divisor")
    if num_gpus % num_nodes:
        raise ValueError(f"{num_gpus} GPUs do not divide over num_nodes={num_nodes}; choose a divisor")
    if num_replicas % num_gpus:
        raise ValueError(f"{num_replicas} replicas do not divide over num_gpus={num_gpus}; choose a multiple")
    if num_replicas < num_experts:
        raise ValueError(f"num_replicas is {num_replicas}, expected at least one for each of {num_experts} experts")


@dataclass(frozen=True)
class EplbPlanner:
    """EPLB for every forecast; its plans have no fixed homes, and moves are not counted.

    Attributes:
        num_groups: Groups of consecutive experts, a multiple of the nodes; one group on one node is the global policy.
        num_nodes: Nodes, each with as many devices.
    """

    num_groups: int = 1
    num_nodes: int = 1

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        load, slots, devices = forecast.load, current.phy2log.shape[1], current.num_devices
        return ReplicationPlan(place_experts(load, slots, self.num_groups, self.num_nodes, devices), devices)


@dataclass(frozen=True)
class ContiguousPlanner:
    """Keeps the current plan: a model without replication."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        return current


@njit(cache=True, nogil=True)
def place_experts(load_LE: FloatArray, num_slots: int, num_groups: int, num_nodes: int, num_devices: int) -> IntArray:
    """Experts in the slots of all layers, `[L, P]`; one group on one node is the global policy."""
    num_layers, num_experts = load_LE.shape
    group_size, slots_per_node = num_experts // num_groups, num_slots // num_nodes
    experts_per_node = num_experts // num_nodes
    phy2log = np.empty((num_layers, num_slots), dtype=np.int64)
    for layer in range(num_layers):
        # 4 groups of 3 experts at places [2, 0, 1, 3]: node 0 gets groups 1 and 2, experts 3 to 8; node 1 the others
        group_load = np.zeros(num_groups)
        for expert in range(num_experts):
            group_load[expert // group_size] += load_LE[layer, expert]
        group_place = _pack(group_load, num_nodes)
        order = np.empty(num_experts, dtype=np.int64)
        for expert in range(num_experts):
            order[group_place[expert // group_size] * group_size + expert % group_size] = expert
        for node in range(num_nodes):
            experts = order[node * experts_per_node : (node + 1) * experts_per_node]
            held, copy_load = _replicate(load_LE[layer][experts], slots_per_node)
            place = _pack(copy_load, num_devices // num_nodes)
            for i in range(slots_per_node):
                phy2log[layer, node * slots_per_node + place[i]] = experts[held[i]]
    return phy2log


@njit(cache=True, nogil=True)
def _replicate(load_E: FloatArray, num_slots: int) -> tuple[IntArray, FloatArray]:
    """Expert and load of each copy, `[P]`."""
    held = replicate(load_E, num_slots)
    return held, (load_E / np.bincount(held, minlength=load_E.size))[held]


@njit(cache=True, nogil=True)
def _pack(load_N: FloatArray, num_packs: int) -> IntArray:
    """Place of each item when packs of equal size lie side by side, `[N]`; heaviest first into the lightest pack.

    Loads [5, 3, 4, 1] into 2 packs: places [0, 3, 2, 1], that is {5, 1} and {4, 3}.
    """
    size = load_N.size // num_packs
    if size == 1:  # nothing to choose: items keep their order
        return np.arange(load_N.size)
    place = np.empty(load_N.size, dtype=np.int64)
    pack_load, used = np.zeros(num_packs), np.zeros(num_packs, dtype=np.int64)
    for item in np.argsort(-load_N, kind="mergesort"):
        pack = np.argmin(np.where(used < size, pack_load, np.inf))
        place[item] = pack * size + used[pack]
        pack_load[pack] += load_N[item]
        used[pack] += 1
    return place
