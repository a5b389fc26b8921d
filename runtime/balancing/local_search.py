"""Which replicas flatten the load: a compiled local search over the replica slots of one layer.

A plan is scored by what matters in the end: the most loaded device after an optimal split, averaged over several
scenarios of the coming load (runtime.balancing.water_filling).

The search changes one replica slot at a time. A first-order gain ranks all (slot, expert) changes, the best few are
relaxed in full, and the best of those is taken if it saves more than its price; then again, until nothing pays. A
search that runs out of trials goes on from where it stopped before the next batch.

Loads are in units of the mean device load. Shape suffixes: L MoE layers, K scenarios, E experts, R replica slots in
device order, G devices, N candidates.
"""

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.water_filling import Layer, copy, replace, score, start

WORK = 40_000
"""What may be spent on one layer before one batch: trials, times slots and devices, times scenarios and six."""
ROUND, ROUGH_ROUND, SURE_ROUND = 20, 3, 48
"""Changes relaxed in full to choose one: in general; while slots are empty or the overload is above `ROUGH`, when most
copies help; and for a forecast without spread, whose single scenario costs little."""
ROUGH = 0.2
EXPERTS, DEVICES = 12, 8
"""Experts considered for copying, and devices to copy to: those that would give and take most."""


@njit(cache=True, nogil=True)
def improve(
    held_LR: IntArray,
    home_LE: IntArray,
    load_LEK: Float32Array,
    weight_K: Float32Array,
    price_L: Float32Array,
    factor_GG: Float32Array,
    max_moves: int,
) -> tuple[IntArray, Float32Array]:
    """Improves the replicas of all layers.

    Args:
        held_LR: Expert in each replica slot, -1 where empty.
        home_LE: Home device of each expert.
        load_LEK: Load of each expert in each scenario.
        weight_K: Weight of each scenario; they sum to 1.
        price_L: What a copy must save.
        factor_GG: Factor to the price of a copy from one device to another, at least 1.
        max_moves: Most slots of a layer that may change.

    Returns:
        The improved replicas `[L, R]`, and what those of each layer save, prices not taken off, `[L]`.
    """
    improved = held_LR.copy()
    gain = np.zeros(len(held_LR), dtype=np.float32)
    for i in range(len(held_LR)):
        layer = start(held_LR[i], home_LE[i], load_LEK[i], len(factor_GG))
        before = score(layer.load, weight_K)
        gain[i] = before - _search(layer, before, weight_K, price_L[i], factor_GG, max_moves)
        for slot in range(layer.held.size):
            improved[i, slot] = layer.held[slot]
    return improved, gain


@njit(cache=True, nogil=True)
def _search(
    layer: Layer, current: np.float32, weight_K: Float32Array, price: float, factor_GG: Float32Array, max_moves: int
) -> np.float32:
    """Improves the layer in place; returns its score."""
    room = layer.held.size // len(layer.load)
    scratch = Layer(
        layer.held.copy(), layer.home, layer.away.copy(), layer.stay.copy(), layer.load.copy(), layer.stirred
    )
    trials = WORK // ((layer.held.size + len(layer.load)) * (6 + weight_K.size))
    for _ in range(max_moves):
        if current <= price or trials <= 0:  # a perfect balance would not pay for a move
            break
        slots, experts = _candidates(layer, weight_K, SURE_ROUND if weight_K.size == 1 else ROUND)
        rough = current > ROUGH or (slots.size > 0 and layer.held[slots[0]] < 0)
        least, chosen = current, -1
        for i in range(slots.size):
            if rough and chosen >= 0 and i >= ROUGH_ROUND:
                break
            copy(layer, scratch, experts[i])
            replace(scratch, slots[i], experts[i])
            cost = score(scratch.load, weight_K) + price * factor_GG[layer.home[experts[i]], slots[i] // room]
            trials -= 1
            if cost < least:
                least, chosen = cost, i
        if chosen < 0:
            break
        replace(layer, slots[chosen], experts[chosen])
        current = score(layer.load, weight_K)
    return current


@njit(cache=True, nogil=True, fastmath=True)
def _candidates(layer: Layer, weight_K: Float32Array, count: int) -> tuple[IntArray, IntArray]:
    """At most `count` changes worth trying: slots `[N]` and the experts to put there `[N]`, most promising first.

    The gain of a copy is the squared device load it would take off if tokens moved between the two devices only; the
    loss of the copy it overwrites is taken from the tokens that are there now.
    """
    held, room = layer.held, layer.held.size // len(layer.load)
    loss_R = np.zeros(held.size, dtype=np.float32)
    for slot in range(held.size):
        for k in range(weight_K.size):
            loss_R[slot] += np.float32(2) * weight_K[k] * layer.away[slot, k] * layer.away[slot, k]
    give_E, take_G = _give_and_take(layer, weight_K)
    devices = _largest(take_G, DEVICES)
    gains = np.full(count, -np.inf, dtype=np.float32)
    slots, experts = np.full(count, -1), np.full(count, -1)
    for expert in _largest(give_E, EXPERTS):
        home = layer.home[expert]
        for device in devices:
            first = device * room
            taken = device == home
            for slot in range(first, first + room):
                taken = taken or held[slot] == expert
            if taken:
                continue
            gain = np.float32(0)
            for k in range(weight_K.size):
                gap = max(layer.load[home, k] - layer.load[device, k], np.float32(0))
                flow = min(layer.stay[expert, k], np.float32(0.5) * gap)
                gain += np.float32(2) * weight_K[k] * flow * (gap - flow)
            if gain <= 0:
                continue
            for slot in range(first, first + room):
                _insert(gain - loss_R[slot], slot, expert, gains, slots, experts)
                if held[slot] < 0:
                    break
    found = 0
    while found < count and slots[found] >= 0:
        found += 1
    return slots[:found], experts[:found]


@njit(cache=True, nogil=True, fastmath=True)
def _give_and_take(layer: Layer, weight_K: Float32Array) -> tuple[Float32Array, Float32Array]:
    """How much each expert could relieve its home `[E]`, and how far each device lies below the mean `[G]`."""
    give_E = np.zeros(layer.home.size, dtype=np.float32)
    for expert in range(layer.home.size):
        for k in range(weight_K.size):
            over = max(layer.load[layer.home[expert], k] - np.float32(1), np.float32(0))
            give_E[expert] += weight_K[k] * min(layer.stay[expert, k], over) * over
    take_G = np.zeros(len(layer.load), dtype=np.float32)
    for device in range(len(layer.load)):
        for k in range(weight_K.size):
            take_G[device] += weight_K[k] * max(np.float32(1) - layer.load[device, k], np.float32(0))
    return give_E, take_G


@njit(cache=True, nogil=True)
def _largest(values: Float32Array, count: int) -> IntArray:
    """Indices of the largest positive values, at most `count`, largest first; the values are used up."""
    chosen = np.empty(min(count, values.size), dtype=np.int64)
    for i in range(chosen.size):
        largest = np.argmax(values)
        if values[largest] <= 0:
            return chosen[:i]
        chosen[i] = largest
        values[largest] = 0
    return chosen


@njit(cache=True, nogil=True)
def _insert(gain: float, slot: int, expert: int, gains: Float32Array, slots: IntArray, experts: IntArray) -> None:
    """Keeps the best changes in order of gain, in place."""
    i = gains.size - 1
    if gain <= gains[i]:
        return
    while i > 0 and gains[i - 1] < gain:
        gains[i], slots[i], experts[i] = gains[i - 1], slots[i - 1], experts[i - 1]
        i -= 1
    gains[i], slots[i], experts[i] = gain, slot, expert
