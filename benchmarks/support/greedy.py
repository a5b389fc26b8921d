"""GreedyPlanner: replicas by the simplest rule that uses the forecast, from nothing at every step; a rival.

The most loaded device gives the excess of its most loaded expert to the device with most room that has a free replica
slot, again and again. Homes stay, tokens are split by quota.

Shape suffixes: E experts, P slots, G devices.
"""

from dataclasses import dataclass

import numpy as np

from data.arrays import BoolArray, FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.plan import EMPTY, ReplicationPlan


@dataclass(frozen=True)
class GreedyPlanner:
    """Has no settings."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """The plan for the forecast; copies that lie in their slot already stay there."""
        phy2log = np.where(current.is_home_slot, current.phy2log, EMPTY)
        for layer, load in enumerate(forecast.load):
            _fill(phy2log[layer], current.is_home_slot[layer], load, current.num_devices)
            _stay(phy2log[layer], current.phy2log[layer], ~current.is_home_slot[layer], current.num_devices)
        return current.with_slots(phy2log)


def _fill(phy2log_P: IntArray, is_home_P: BoolArray, load_E: FloatArray, num_devices: int) -> None:
    """Fills the empty slots of a layer, in place."""
    block = phy2log_P.reshape(num_devices, -1)
    home_E = np.empty(load_E.size, dtype=np.int64)
    home_E[phy2log_P[is_home_P]] = np.flatnonzero(is_home_P) // block.shape[1]
    left_E, load_G = load_E.copy(), np.bincount(home_E, load_E, num_devices)
    mean = load_G.mean()
    for _ in range(np.count_nonzero(block == EMPTY)):
        donor = int(load_G.argmax())
        expert = int(np.where(home_E == donor, left_E, -1).argmax())
        open_G = (block == EMPTY).any(1) & (block != expert).all(1)
        receiver = int(np.where(open_G, load_G, np.inf).argmin())
        tokens = min(left_E[expert], load_G[donor] - mean, mean - load_G[receiver])
        if tokens <= 0 or not open_G[receiver]:
            break
        block[receiver, np.flatnonzero(block[receiver] == EMPTY)[0]] = expert
        left_E[expert] -= tokens
        load_G[[donor, receiver]] += -tokens, tokens


def _stay(phy2log_P: IntArray, before_P: IntArray, replica_P: BoolArray, num_devices: int) -> None:
    """Brings each device's replicas into the order that leaves most of them in their slot, in place."""
    size = phy2log_P.size // num_devices
    for first in range(0, phy2log_P.size, size):
        slots = first + np.flatnonzero(replica_P[first : first + size])
        wanted = phy2log_P[slots].tolist()
        kept = [expert if expert in wanted else None for expert in before_P[slots].tolist()]
        rest = iter([expert for expert in wanted if expert not in kept])
        phy2log_P[slots] = [next(rest, EMPTY) if expert is None else expert for expert in kept]
