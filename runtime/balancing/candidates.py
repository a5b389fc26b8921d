"""Compiled ranking of changes worth trying: which expert to copy into which replica slot, by a first-order gain.

The local searches (runtime.balancing.local_search, runtime.balancing.moving_homes) relax these changes in full. Two
devices with a replica slot each and loads [1.6, .4]; expert 0 (1.2) relieves device 0 more than expert 1 (.4) does:

    >>> from runtime.balancing.water_filling import start
    >>> load, free = np.array([[1.2], [0.4], [0.3], [0.1]], dtype=np.float32), np.zeros(1, dtype=np.float32)
    >>> layer = start(np.array([-1, -1]), np.array([0, 1, 2]), np.array([0, 0, 1, 1]), load, free)
    >>> slots, experts = candidates(layer, np.ones(1, dtype=np.float32), Effort(4, 4, 12, 8))
    >>> slots.tolist(), experts.tolist()
    ([1, 1], [0, 1])

Shape suffixes: K scenarios, E experts, R replica slots in device order, G devices, N candidates.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.water_filling import Layer


class Effort(NamedTuple):
    """How far one change of a layer is looked for.

    Attributes:
        most: Most changes relaxed.
        enough: Changes relaxed after which the best one is taken if any pays.
        experts: Experts considered for copying, those that relieve most.
        devices: Devices considered to copy to, those with most space.
    """

    most: int
    enough: int
    experts: int
    devices: int


@njit(cache=True, nogil=True, fastmath=True)
def candidates(layer: Layer, weight_K: Float32Array, effort: Effort) -> tuple[IntArray, IntArray]:
    """Changes worth trying, at most `effort.most`, the most promising first: slots `[N]` and experts for them `[N]`.

    The gain of a copy is the squared device load it would save if tokens moved between its two devices only. A flow f
    across a difference d of loads saves 2 f (d - f): loads 1.6 and .4 become 1 and 1 with f = .6, d = 1.2; the squares
    fall from 2.72 to 2, and 2 * .6 * .6 = .72. The loss of the copy that is overwritten is estimated from the tokens
    now on it in the same way: with equal loads, sending f tokens home adds 2 f ** 2.
    """
    held, count = layer.held, effort.most
    loss_R = np.zeros(held.size, dtype=np.float32)
    for slot in range(held.size):
        for k in range(weight_K.size):
            if layer.on_replica[slot, k] > 0:
                time = layer.on_replica[slot, k] + layer.waking[k]
                loss_R[slot] += np.float32(2) * weight_K[k] * time * time
    relief_E, space_G = _relief_and_space(layer, weight_K)
    devices = _largest(space_G, effort.devices)
    gains = np.full(count, -np.inf, dtype=np.float32)
    slots, experts = np.full(count, -1), np.full(count, -1)
    for expert in _largest(relief_E, effort.experts):
        home = layer.home[expert]
        for device in devices:
            present = device == home
            for slot in range(layer.first[device], layer.first[device + 1]):
                present = present or held[slot] == expert
            if present:
                continue
            gain = np.float32(0)
            for k in range(weight_K.size):
                gap = max(layer.load[home, k] - layer.load[device, k], np.float32(0))
                gain += weight_K[k] * _saved(layer.at_home[expert, k], gap, layer.waking[k])
            if gain <= 0:
                continue
            for slot in range(layer.first[device], layer.first[device + 1]):
                insert(gain - loss_R[slot], slot, expert, gains, slots, experts)
                if held[slot] < 0:  # an empty slot loses nothing, so the slots after it cannot be better
                    break
    found = 0
    while found < count and slots[found] >= 0:
        found += 1
    return slots[:found], experts[:found]


@njit(cache=True, nogil=True, fastmath=True)
def _saved(tokens: np.float32, gap: np.float32, waking: np.float32) -> np.float32:
    """Squared device load that a copy saves across a difference of loads.

    The whole expert may move, or the copy becomes active as well, which takes `waking` off the difference. Without a
    price the latter is all that matters.
    """
    flow = min(tokens, np.float32(0.5) * max(gap - waking, np.float32(0)))
    saved = np.float32(2) * flow * (gap - waking - flow)
    whole = tokens + waking
    if waking > 0 and tokens > 0 and gap > whole:
        saved = max(saved, np.float32(2) * whole * (gap - whole))
    return saved


@njit(cache=True, nogil=True, fastmath=True)
def _relief_and_space(layer: Layer, weight_K: Float32Array) -> tuple[Float32Array, Float32Array]:
    """How much each expert could relieve its home `[E]`, and how far each device is below the mean `[G]`."""
    relief_E = np.zeros(layer.home.size, dtype=np.float32)
    for expert in range(layer.home.size):
        for k in range(weight_K.size):
            over = max(layer.load[layer.home[expert], k] - np.float32(1), np.float32(0))
            if layer.at_home[expert, k] > 0:
                relief_E[expert] += weight_K[k] * min(layer.at_home[expert, k] + layer.waking[k], over) * over
    space_G = np.zeros(len(layer.load), dtype=np.float32)
    for device in range(len(layer.load)):
        for k in range(weight_K.size):
            space_G[device] += weight_K[k] * max(np.float32(1) - layer.load[device, k], np.float32(0))
    return relief_E, space_G


@njit(cache=True, nogil=True)
def _largest(values: Float32Array, count: int) -> IntArray:
    """Indices of the largest positive values, at most `count`, largest first; overwrites the values."""
    chosen = np.empty(min(count, values.size), dtype=np.int64)
    for i in range(chosen.size):
        largest = np.argmax(values)
        if values[largest] <= 0:
            return chosen[:i]
        chosen[i] = largest
        values[largest] = 0
    return chosen


@njit(cache=True, nogil=True)
def insert(gain: float, slot: int, expert: int, gains: Float32Array, slots: IntArray, experts: IntArray) -> None:
    """Inserts a change into the lists of the best changes, sorted by gain, in place."""
    i = gains.size - 1
    if gain <= gains[i]:
        return
    while i > 0 and gains[i - 1] < gain:
        gains[i], slots[i], experts[i] = gains[i - 1], slots[i - 1], experts[i - 1]
        i -= 1
    gains[i], slots[i], experts[i] = gain, slot, expert
