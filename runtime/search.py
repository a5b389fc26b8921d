"""Which replicas flatten the load: a compiled local search over the replica slots of one layer.

A plan is scored by what matters in the end: the most loaded device after an optimal split, averaged over several
scenarios of the coming load. The split of a scenario is relaxed rather than solved: for each replica in turn, tokens
flow between the expert's home device and the replica's until the two are level or the tokens run out. Such sweeps
converge to the split of least squared device load, which also has the least maximum (Fujishige 1980, on
lexicographically optimal bases). All scenarios are relaxed together, side by side in memory.

The search changes one replica slot at a time. A first-order gain ranks all (slot, expert) changes, the best few are
relaxed in full, and the best of those is taken if it saves more than its price; then again, until nothing pays. A
search that runs out of trials goes on from where it stopped before the next batch.

Loads are in units of the mean device load. Shape suffixes: L MoE layers, K scenarios, E experts, R replica slots in
device order, G devices, N candidates.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.plan import IntArray

Floats = npt.NDArray[np.float32]
WORK = 6144
"""What may be spent on one layer before one batch: trials times slots and devices."""
ROUND, FIRST_ROUND, SURE_ROUND = 24, 6, 96
"""Changes relaxed in full to choose one: in general; while slots are empty, when any copy helps; and for a forecast
without spread, whose single scenario costs little."""
EXPERTS, DEVICES = 24, 16
"""Experts considered for copying, and devices to copy to: those that would give and take most."""
SWEEPS, FIRST_SWEEPS = 5, 16
STILL = np.float32(1e-3)
"""A flow that counts as none."""
UNEVEN = np.float32(0.3)
"""Weight of the root of squared overloads beside the maximum; tells apart plans with the same maximum."""


class Layer(NamedTuple):
    """One layer's replicas and where the tokens of each scenario lie.

    Attributes:
        held: Expert in each replica slot, -1 where empty, `[R]`.
        home: Home device of each expert, `[E]`.
        away: Tokens on each replica, `[R, K]`.
        stay: Tokens of each expert at home, `[E, K]`.
        load: Load of each device, `[G, K]`.
        stirred: Sweep before which a device's load last changed, `[G]`.
    """

    held: IntArray
    home: IntArray
    away: Floats
    stay: Floats
    load: Floats
    stirred: IntArray


@njit(nogil=True)
def improve(
    held_LR: IntArray, home_LE: IntArray, load_LEK: Floats, weight_K: Floats, price_LGG: Floats, max_moves: int
) -> tuple[IntArray, Floats]:
    """Improves the replicas of all layers.

    Args:
        held_LR: Expert in each replica slot, -1 where empty.
        home_LE: Home device of each expert.
        load_LEK: Load of each expert in each scenario.
        weight_K: Weight of each scenario; they sum to 1.
        price_LGG: What a copy from one device to another must save.
        max_moves: Most slots of a layer that may change.

    Returns:
        The improved replicas `[L, R]`, and what those of each layer save, prices not taken off, `[L]`.
    """
    improved = held_LR.copy()
    gain = np.zeros(len(held_LR), dtype=np.float32)
    for i in range(len(held_LR)):
        layer = _start(held_LR[i], home_LE[i], load_LEK[i], price_LGG.shape[1])
        before = _score(layer.load, weight_K)
        gain[i] = before - _search(layer, before, weight_K, price_LGG[i], max_moves)
        improved[i] = layer.held
    return improved, gain


@njit(nogil=True)
def _start(held_R: IntArray, home_E: IntArray, load_EK: Floats, num_devices: int) -> Layer:
    """The layer with every scenario's split relaxed."""
    away = np.zeros((held_R.size, load_EK.shape[1]), dtype=np.float32)
    load = np.zeros((num_devices, load_EK.shape[1]), dtype=np.float32)
    for expert in range(home_E.size):
        load[home_E[expert]] += load_EK[expert]
    layer = Layer(held_R.copy(), home_E, away, load_EK.copy(), load, np.zeros(num_devices, dtype=np.int64))
    _relax(layer, FIRST_SWEEPS)
    return layer


@njit(nogil=True)
def _search(layer: Layer, score: float, weight_K: Floats, price_GG: Floats, max_moves: int) -> float:
    """Improves the layer in place; returns its score."""
    room = layer.held.size // len(layer.load)
    scratch = Layer(
        layer.held.copy(),
        layer.home,
        layer.away.copy(),
        layer.stay.copy(),
        layer.load.copy(),
        layer.stirred.copy(),
    )
    trials = WORK // (layer.held.size + len(layer.load))
    for _ in range(max_moves):
        if score <= price_GG.min() or trials <= 0:  # a perfect balance would not pay for a move
            break
        slots, experts = _candidates(layer, weight_K, SURE_ROUND if weight_K.size == 1 else ROUND)
        if slots.size > 0 and layer.held[slots[0]] < 0:
            slots = slots[:FIRST_ROUND]
        least, chosen = score, -1
        for i in range(slots.size):
            _copy(layer, scratch, experts[i])
            _replace(scratch, slots[i], experts[i])
            cost = _score(scratch.load, weight_K) + price_GG[layer.home[experts[i]], slots[i] // room]
            trials -= 1
            if cost < least:
                least, chosen = cost, i
        if chosen < 0:
            break
        _replace(layer, slots[chosen], experts[chosen])
        score = _score(layer.load, weight_K)
    return score


@njit(nogil=True)
def _copy(layer: Layer, scratch: Layer, expert: int) -> None:
    """Makes the scratch equal to the layer, as far as putting one more expert into a slot can touch it."""
    scratch.held[:] = layer.held
    for device in range(layer.load.shape[0]):
        for k in range(layer.load.shape[1]):
            scratch.load[device, k] = layer.load[device, k]
    for slot in range(layer.held.size):
        other = layer.held[slot]
        if other >= 0:
            for k in range(layer.load.shape[1]):
                scratch.away[slot, k] = layer.away[slot, k]
                scratch.stay[other, k] = layer.stay[other, k]
        else:
            scratch.away[slot] = 0
    scratch.stay[expert] = layer.stay[expert]


@njit(nogil=True)
def _replace(layer: Layer, slot: int, expert: int) -> None:
    """Puts an expert into a replica slot, sends the tokens of the one it held home, and relaxes."""
    device = slot // (layer.held.size // len(layer.load))
    old = layer.held[slot]
    layer.stirred[:] = -1
    layer.stirred[device] = 0
    layer.stirred[layer.home[expert]] = 0
    if old >= 0:
        layer.stirred[layer.home[old]] = 0
        layer.load[layer.home[old]] += layer.away[slot]
        layer.load[device] -= layer.away[slot]
        layer.stay[old] += layer.away[slot]
        layer.away[slot] = 0
    layer.held[slot] = expert
    _relax(layer, SWEEPS)


@njit(nogil=True, fastmath=True)
def _relax(layer: Layer, sweeps: int) -> None:
    """Lets tokens flow between homes and replicas towards level devices, where something has stirred."""
    room = layer.held.size // len(layer.load)
    for sweep in range(sweeps):
        for slot in range(layer.held.size):
            expert, there = layer.held[slot], slot // room
            if expert < 0:
                continue
            here = layer.home[expert]
            if max(layer.stirred[here], layer.stirred[there]) < sweep:
                continue
            from_load, to_load = layer.load[here], layer.load[there]
            away, stay = layer.away[slot], layer.stay[expert]
            most = np.float32(0)
            for k in range(from_load.size):
                flow = np.float32(0.5) * (from_load[k] - to_load[k])
                flow = min(max(flow, -away[k]), stay[k])
                from_load[k] -= flow
                to_load[k] += flow
                away[k] += flow
                stay[k] -= flow
                most = max(most, abs(flow))
            if most > STILL:
                layer.stirred[here] = layer.stirred[there] = sweep + 1


@njit(nogil=True, fastmath=True)
def _score(load: Floats, weight_K: Floats) -> float:
    """Overload of the most loaded device, and a little of how uneven the others are, averaged over scenarios."""
    top = load[0].copy()
    squares = np.zeros_like(top)
    for device in range(load.shape[0]):
        for k in range(top.size):
            over = max(load[device, k] - np.float32(1), np.float32(0))
            top[k] = max(top[k], load[device, k])
            squares[k] += over * over
    score = np.float32(0)
    for k in range(top.size):
        score += weight_K[k] * (top[k] - np.float32(1) + UNEVEN * np.sqrt(squares[k]))
    return score


@njit(nogil=True, fastmath=True)
def _candidates(layer: Layer, weight_K: Floats, count: int) -> tuple[IntArray, IntArray]:
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
        home, stay = layer.load[layer.home[expert]], layer.stay[expert]
        for device in devices:
            first = device * room
            if device == layer.home[expert] or expert in held[first : first + room]:
                continue
            gain, load = np.float32(0), layer.load[device]
            for k in range(weight_K.size):
                gap = max(home[k] - load[k], np.float32(0))
                flow = min(stay[k], np.float32(0.5) * gap)
                gain += np.float32(2) * weight_K[k] * flow * (gap - flow)
            if gain <= 0:
                continue
            for slot in range(first, first + room):
                _insert(gain - loss_R[slot], slot, expert, gains, slots, experts)
                if held[slot] < 0:
                    break
    found = (slots >= 0).sum()
    return slots[:found], experts[:found]


@njit(nogil=True, fastmath=True)
def _give_and_take(layer: Layer, weight_K: Floats) -> tuple[Floats, Floats]:
    """How much each expert could relieve its home `[E]`, and how far each device lies below the mean `[G]`."""
    over_GK = np.maximum(layer.load - np.float32(1), np.float32(0))
    give_E = np.zeros(layer.home.size, dtype=np.float32)
    for expert in range(layer.home.size):
        over, stay = over_GK[layer.home[expert]], layer.stay[expert]
        for k in range(weight_K.size):
            give_E[expert] += weight_K[k] * min(stay[k], over[k]) * over[k]
    take_G = np.zeros(len(layer.load), dtype=np.float32)
    for device in range(len(layer.load)):
        for k in range(weight_K.size):
            take_G[device] += weight_K[k] * max(np.float32(1) - layer.load[device, k], np.float32(0))
    return give_E, take_G


@njit(nogil=True)
def _largest(values: Floats, count: int) -> IntArray:
    """Indices of the largest positive values, at most `count`, largest first; the values are used up."""
    chosen = np.empty(min(count, values.size), dtype=np.int64)
    for i in range(chosen.size):
        largest = np.argmax(values)
        if values[largest] <= 0:
            return chosen[:i]
        chosen[i] = largest
        values[largest] = 0
    return chosen


@njit(nogil=True)
def _insert(gain: float, slot: int, expert: int, gains: Floats, slots: IntArray, experts: IntArray) -> None:
    """Keeps the best changes in order of gain, in place."""
    i = gains.size - 1
    if gain <= gains[i]:
        return
    while i > 0 and gains[i - 1] < gain:
        gains[i], slots[i], experts[i] = gains[i - 1], slots[i - 1], experts[i - 1]
        i -= 1
    gains[i], slots[i], experts[i] = gain, slot, expert
