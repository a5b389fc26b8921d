"""The split of one layer in several scenarios at once, relaxed: what a plan is scored by, compiled.

For each replica in turn, tokens flow between the expert's home device and the replica's until the two are level or the
tokens run out. Such sweeps converge to the split of least squared device load, which also has the least maximum
(Fujishige 1980, on lexicographically optimal bases). The scenarios lie side by side in memory and flow together; a
sweep passes by the devices where nothing has stirred.

Loads are in units of the mean device load. Shape suffixes: K scenarios, E experts, R replica slots in device order,
G devices.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray

SWEEPS, FIRST_SWEEPS = 4, 16
STILL = np.float32(2e-3)
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
    away: Float32Array
    stay: Float32Array
    load: Float32Array
    stirred: IntArray


@njit(cache=True, nogil=True)
def start(held_R: IntArray, home_E: IntArray, load_EK: Float32Array, num_devices: int) -> Layer:
    """The layer with every scenario's split relaxed."""
    away = np.zeros((held_R.size, load_EK.shape[1]), dtype=np.float32)
    load = np.zeros((num_devices, load_EK.shape[1]), dtype=np.float32)
    for expert in range(home_E.size):
        for k in range(load_EK.shape[1]):
            load[home_E[expert], k] += load_EK[expert, k]
    layer = Layer(held_R.copy(), home_E, away, load_EK.copy(), load, np.zeros(num_devices, dtype=np.int64))
    _relax(layer, FIRST_SWEEPS)
    return layer


@njit(cache=True, nogil=True)
def copy(layer: Layer, scratch: Layer, expert: int) -> None:
    """Makes the scratch equal to the layer, as far as putting one more expert into a slot can touch it."""
    num_devices, num_scenarios = layer.load.shape
    for device in range(num_devices):
        for k in range(num_scenarios):
            scratch.load[device, k] = layer.load[device, k]
    for slot in range(layer.held.size):
        other = scratch.held[slot] = layer.held[slot]
        for k in range(num_scenarios):
            scratch.away[slot, k] = layer.away[slot, k]
            if other >= 0:
                scratch.stay[other, k] = layer.stay[other, k]
    for k in range(num_scenarios):
        scratch.stay[expert, k] = layer.stay[expert, k]


@njit(cache=True, nogil=True)
def replace(layer: Layer, slot: int, expert: int) -> None:
    """Puts an expert into a replica slot, sends the tokens of the one it held home, and relaxes."""
    held, home, away, stay, load, stirred = layer
    num_devices, num_scenarios = load.shape
    device, old = slot // (held.size // num_devices), held[slot]
    for other in range(num_devices):
        stirred[other] = 0 if other in (device, home[expert]) or (old >= 0 and other == home[old]) else -1
    if old >= 0:
        for k in range(num_scenarios):
            load[home[old], k] += away[slot, k]
            load[device, k] -= away[slot, k]
            stay[old, k] += away[slot, k]
            away[slot, k] = 0
    held[slot] = expert
    _relax(layer, SWEEPS)


@njit(cache=True, nogil=True, fastmath=True)
def _relax(layer: Layer, sweeps: int) -> None:
    """Lets tokens flow between homes and replicas towards level devices, where something has stirred."""
    held, home, away, stay, load, stirred = layer
    room = held.size // load.shape[0]
    for sweep in range(sweeps):
        for slot in range(held.size):
            expert, there = held[slot], slot // room
            if expert < 0:
                continue
            here = home[expert]
            if max(stirred[here], stirred[there]) < sweep:
                continue
            most = np.float32(0)
            for k in range(load.shape[1]):
                flow = np.float32(0.5) * (load[here, k] - load[there, k])
                flow = min(max(flow, -away[slot, k]), stay[expert, k])
                load[here, k] -= flow
                load[there, k] += flow
                away[slot, k] += flow
                stay[expert, k] -= flow
                most = max(most, abs(flow))
            if most > STILL:
                stirred[here] = stirred[there] = sweep + 1


@njit(cache=True, nogil=True, fastmath=True)
def score(load: Float32Array, weight_K: Float32Array) -> np.float32:
    """Overload of the most loaded device, and a little of how uneven the others are, averaged over scenarios."""
    top = np.zeros(weight_K.size, dtype=np.float32)
    squares = np.zeros(weight_K.size, dtype=np.float32)
    for device in range(load.shape[0]):
        for k in range(top.size):
            over = max(load[device, k] - np.float32(1), np.float32(0))
            top[k] = max(top[k], load[device, k])
            squares[k] += over * over
    score = np.float32(0)
    for k in range(top.size):
        score += weight_K[k] * (top[k] - np.float32(1) + UNEVEN * np.sqrt(squares[k]))
    return score
