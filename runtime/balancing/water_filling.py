"""Score of a plan: the most loaded device after a split of divisible tokens, in several load scenarios at once.

For each replica in turn, tokens flow between the expert's home device and the replica's device until both have the same
load or the tokens run out. Such sweeps converge to the split of least squared device load, which also has the least
maximum (Fujishige 1980, on lexicographically optimal bases). The exact integer split (runtime.balancing.max_flow) would
give the same maximum; this one takes a few microseconds and can go on from the split of a similar plan. The scenarios
lie side by side in memory and are relaxed together; a sweep skips replicas whose two devices have not changed.

Loads are in units of the mean device load. Two devices, two experts on each, loads [1.2, .4 | .3, .1]: the devices have
1.6 and .4, an overload of .6. With a copy of expert 0 on device 1, half of the difference of 1.2 flows there and both
have 1:

    >>> load = np.array([[1.2], [0.4], [0.3], [0.1]], dtype=np.float32)
    >>> layer = start(np.array([-1, 0]), np.array([0, 0, 1, 1]), load, 2)
    >>> layer.load[:, 0].round(3).tolist(), layer.on_replica[:, 0].round(3).tolist()
    ([1.0, 1.0], [0.0, 0.6000000238418579])

Shape suffixes: K scenarios, E experts, R replica slots in device order, G devices.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray

SWEEPS, FIRST_SWEEPS = 4, 16
"""Sweeps after one change of a relaxed layer, and of a layer that has not been relaxed."""
NO_FLOW = np.float32(2e-3)
"""Largest flow that does not count as a change."""
UNEVEN = np.float32(0.3)
"""Weight of the root of squared overloads beside the maximum; it tells plans with the same maximum apart."""


class Layer(NamedTuple):
    """One layer's replicas and where the tokens of each scenario are computed.

    Attributes:
        held: Expert in each replica slot, -1 where empty, `[R]`.
        home: Home device of each expert, `[E]`.
        on_replica: Tokens on each replica, `[R, K]`.
        at_home: Tokens of each expert at home, `[E, K]`.
        load: Load of each device, `[G, K]`.
        changed: Number of the sweep that must visit each device because its load changed in the sweep before, `[G]`.
    """

    held: IntArray
    home: IntArray
    on_replica: Float32Array
    at_home: Float32Array
    load: Float32Array
    changed: IntArray


@njit(cache=True, nogil=True)
def start(held_R: IntArray, home_E: IntArray, load_EK: Float32Array, num_devices: int) -> Layer:
    """The layer with the split of every scenario relaxed."""
    on_replica = np.zeros((held_R.size, load_EK.shape[1]), dtype=np.float32)
    load = np.zeros((num_devices, load_EK.shape[1]), dtype=np.float32)
    for expert in range(home_E.size):
        for k in range(load_EK.shape[1]):
            load[home_E[expert], k] += load_EK[expert, k]
    layer = Layer(held_R.copy(), home_E, on_replica, load_EK.copy(), load, np.zeros(num_devices, dtype=np.int64))
    _relax(layer, FIRST_SWEEPS)
    return layer


@njit(cache=True, nogil=True)
def copy(layer: Layer, scratch: Layer, expert: int) -> None:
    """Makes the scratch equal to the layer for a trial that puts `expert` into a slot.

    Only experts with a replica, and `expert`, can have tokens moved, so the tokens at home of all others are left as
    they are in the scratch: the copy stays small with many experts.
    """
    num_devices, num_scenarios = layer.load.shape
    for device in range(num_devices):
        for k in range(num_scenarios):
            scratch.load[device, k] = layer.load[device, k]
    for slot in range(layer.held.size):
        other = scratch.held[slot] = layer.held[slot]
        for k in range(num_scenarios):
            scratch.on_replica[slot, k] = layer.on_replica[slot, k]
            if other >= 0:
                scratch.at_home[other, k] = layer.at_home[other, k]
    for k in range(num_scenarios):
        scratch.at_home[expert, k] = layer.at_home[expert, k]


@njit(cache=True, nogil=True)
def replace(layer: Layer, slot: int, expert: int) -> None:
    """Puts an expert into a replica slot, sends the tokens of the old one home, and relaxes."""
    held, home, on_replica, at_home, load, changed = layer
    num_devices, num_scenarios = load.shape
    device, old = slot // (held.size // num_devices), held[slot]
    for other in range(num_devices):  # the first sweep visits the slot's device and the two homes alone
        changed[other] = 0 if other in (device, home[expert]) or (old >= 0 and other == home[old]) else -1
    if old >= 0:
        for k in range(num_scenarios):
            load[home[old], k] += on_replica[slot, k]
            load[device, k] -= on_replica[slot, k]
            at_home[old, k] += on_replica[slot, k]
            on_replica[slot, k] = 0
    held[slot] = expert
    _relax(layer, SWEEPS)


@njit(cache=True, nogil=True, fastmath=True)
def _relax(layer: Layer, sweeps: int) -> None:
    """Lets tokens flow between homes and replicas towards equal loads, in place."""
    held, home, on_replica, at_home, load, changed = layer
    slots_per_device = held.size // load.shape[0]
    for sweep in range(sweeps):
        for slot in range(held.size):
            expert, there = held[slot], slot // slots_per_device
            if expert < 0:
                continue
            here = home[expert]
            if max(changed[here], changed[there]) < sweep:
                continue
            most = np.float32(0)
            for k in range(load.shape[1]):
                flow = np.float32(0.5) * (load[here, k] - load[there, k])  # negative: tokens return home
                flow = min(max(flow, -on_replica[slot, k]), at_home[expert, k])
                load[here, k] -= flow
                load[there, k] += flow
                on_replica[slot, k] += flow
                at_home[expert, k] -= flow
                most = max(most, abs(flow))
            if most > NO_FLOW:
                changed[here] = changed[there] = sweep + 1


@njit(cache=True, nogil=True, fastmath=True)
def score(load: Float32Array, weight_K: Float32Array) -> np.float32:
    """Overload of the most loaded device plus a part for how uneven the others are, averaged over scenarios.

    For device loads [1.6, .4]: .6 + .3 * sqrt(.6 ** 2) = .78.
    """
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
