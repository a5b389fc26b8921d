"""The rivals: no replicas at all, and EPLB, which shipped balancers solve anew from summed loads.

EPLB is written from the published algorithm of its global policy: copy the expert with most load per copy until all
slots are used, then pack the copies, heaviest first, into the least loaded device that still has a free slot.

Shape suffixes: L MoE layers, E logical experts, P slots, G devices.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from data.arrays import FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.plan import ReplicationPlan


@dataclass(frozen=True)
class ContiguousPlanner:
    """Leaves everything where it is."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.balancing.planner.HomePlanner.plan`."""
        return current


@dataclass(frozen=True)
class EplbPlanner:
    """Solves the placement anew for every forecast: flat if tokens are split evenly, with no thought for moves."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.balancing.planner.HomePlanner.plan`; the plan has no fixed homes."""
        slots = current.phy2log.shape[1]
        return ReplicationPlan(_eplb(forecast.load, slots, current.num_devices), current.num_devices)


@njit(cache=True, nogil=True)
def _eplb(load_LE: FloatArray, num_slots: int, num_devices: int) -> IntArray:
    """Slots of all layers, `[L, P]`."""
    num_layers, num_experts = load_LE.shape
    room = num_slots // num_devices
    phy2log = np.empty((num_layers, num_slots), dtype=np.int64)
    for layer in range(num_layers):
        copies = np.ones(num_experts, dtype=np.int64)
        expert_of = np.empty(num_slots, dtype=np.int64)
        expert_of[:num_experts] = np.arange(num_experts)
        for copy in range(num_experts, num_slots):
            expert_of[copy] = np.argmax(load_LE[layer] / copies)
            copies[expert_of[copy]] += 1
        weight = (load_LE[layer] / copies)[expert_of]
        device_weight, filled = np.zeros(num_devices), np.zeros(num_devices, dtype=np.int64)
        for copy in np.argsort(-weight, kind="mergesort"):
            device = np.argmin(np.where(filled < room, device_weight, np.inf))
            phy2log[layer, device * room + filled[device]] = expert_of[copy]
            device_weight[device] += weight[copy]
            filled[device] += 1
    return phy2log
