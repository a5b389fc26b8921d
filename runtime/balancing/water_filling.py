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
    >>> layer = start(np.array([-1, 0]), np.array([0, 1, 2]), np.array([0, 0, 1, 1]), load, np.zeros(1, np.float32))
    >>> layer.load[:, 0].round(3).tolist(), layer.on_replica[:, 0].round(3).tolist()
    ([1.0, 1.0], [0.0, 0.6000000238418579])

Shape suffixes: K scenarios, E experts, R replica slots in device order, G devices.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.leveling import copies_by_expert
from runtime.balancing.max_flow import least_time

SWEEPS, FIRST_SWEEPS = 4, 16
"""Sweeps after one change of a relaxed layer, and most sweeps of a layer that has not been relaxed."""
NO_FLOW = np.float32(2e-3)
"""Largest flow that does not count as a change."""
UNITS = np.float32(65536)
"""Whole units of load in the mean device load, for the exact split."""
ROUNDED = np.float32(8) / UNITS
"""Tokens left at home by the exact split that are taken for its rounding, in the same unit."""
UNEVEN = np.float32(0.3)
"""Weight of the root of squared overloads beside the maximum; it tells plans with the same maximum apart."""


class Layer(NamedTuple):
    """One layer's replicas and where the tokens of each scenario are computed.

    Attributes:
        held: Expert in each replica slot, -1 where empty, `[R]`.
        device: Device of each replica slot, `[R]`.
        first: First replica slot of each device, and R at the end, `[G + 1]`.
        home: Home device of each expert, `[E]`.
        on_replica: Tokens on each replica, `[R, K]`.
        at_home: Tokens of each expert at home, `[E, K]`.
        load: Load of each device, prices of its active slots included, `[G, K]`.
        waking: Price of an active slot, in the units of loads, `[K]`; 0 where tokens alone count.
        changed: Number of the sweep that must visit each device because its load changed in the sweep before, `[G]`.
    """

    held: IntArray
    device: IntArray
    first: IntArray
    home: IntArray
    on_replica: Float32Array
    at_home: Float32Array
    load: Float32Array
    waking: Float32Array
    changed: IntArray


@njit(cache=True, nogil=True)
def start(
    held_R: IntArray, first_G: IntArray, home_E: IntArray, load_EK: Float32Array, waking_K: Float32Array
) -> Layer:
    """The layer with the split of every scenario relaxed.

    Args:
        held_R: Expert in each replica slot, -1 where empty.
        first_G: First replica slot of each device, and R at the end, `[G + 1]`.
        home_E: Home device of each expert.
        load_EK: Load of each expert in each scenario.
        waking_K: Price of an active slot in each scenario.
    """
    layer = at_home(held_R, first_G, home_E, load_EK, waking_K)
    relax(layer, FIRST_SWEEPS)
    return layer


@njit(cache=True, nogil=True)
def at_home(
    held_R: IntArray, first_G: IntArray, home_E: IntArray, load_EK: Float32Array, waking_K: Float32Array
) -> Layer:
    """The layer with all tokens at home; arguments as in `start`."""
    num_devices = first_G.size - 1
    device_R = np.empty(held_R.size, dtype=np.int64)
    for device in range(num_devices):
        device_R[first_G[device] : first_G[device + 1]] = device
    load = np.zeros((num_devices, load_EK.shape[1]), dtype=np.float32)
    for expert in range(home_E.size):
        for k in range(load_EK.shape[1]):
            if load_EK[expert, k] > 0:
                load[home_E[expert], k] += load_EK[expert, k] + waking_K[k]
    on_replica = np.zeros((held_R.size, load_EK.shape[1]), dtype=np.float32)
    changed = np.zeros(num_devices, dtype=np.int64)
    return Layer(held_R.copy(), device_R, first_G, home_E, on_replica, load_EK.copy(), load, waking_K, changed)


@njit(cache=True, nogil=True)
def start_exactly(
    held_R: IntArray, first_G: IntArray, home_E: IntArray, load_E1: Float32Array, waking_1: Float32Array
) -> Layer:
    """As `start` for one scenario, but begun with the exact split, or with prices the one that the runtime would make.

    Where copies form long chains over many devices, sweeps alone come near the least maximum only slowly.
    """
    layer = at_home(held_R, first_G, home_E, load_E1, waking_1)
    num_devices = first_G.size - 1
    slots_per_device = (home_E.size + held_R.size) // num_devices
    phy2log = np.full(num_devices * slots_per_device, -1, dtype=np.int64)
    slot_E, used_G = np.empty(home_E.size, dtype=np.int64), np.zeros(num_devices, dtype=np.int64)
    for expert in range(home_E.size):
        device = home_E[expert]
        slot_E[expert] = device * slots_per_device + used_G[device]
        phy2log[slot_E[expert]] = expert
        used_G[device] += 1
    for slot in range(held_R.size):
        device = layer.device[slot]
        phy2log[device * slots_per_device + used_G[device]] = held_R[slot]
        used_G[device] += 1
    total_E, own_P = (load_E1[:, 0] * UNITS).astype(np.int64), np.zeros_like(phy2log)
    copies, price = copies_by_expert(phy2log, home_E.size, num_devices, num_devices), int(waking_1[0] * UNITS)
    flow = least_time(
        np.expand_dims(total_E, 0), total_E, own_P, phy2log, copies, copies, price, num_devices, num_devices
    )
    used_G[:] = 0
    for expert in range(home_E.size):
        used_G[home_E[expert]] += 1
    for slot in range(held_R.size):
        device, expert = layer.device[slot], held_R[slot]
        there = device * slots_per_device + used_G[device]
        used_G[device] += 1
        if expert >= 0:
            tokens, left = np.float32(flow.quota[there]) / UNITS, layer.at_home[expert, 0]
            send(layer, slot, 0, tokens if tokens + ROUNDED < left else left)
    relax(layer, FIRST_SWEEPS)
    return layer


@njit(cache=True, nogil=True)
def start_like(like: Layer, load_EK: Float32Array, waking_K: Float32Array, load_E: Float32Array) -> Layer:
    """The layer in other scenarios `[E, K]`, begun with the shares that a split of the load `[E]` sends to replicas."""
    layer = at_home(like.held, like.first, like.home, load_EK, waking_K)
    held, device, home, sent = layer.held, layer.device, layer.home, like.on_replica
    load, on_replica, left = layer.load, layer.on_replica, layer.at_home
    for slot in range(held.size):
        expert = held[slot]
        if expert < 0 or sent[slot, 0] <= 0:
            continue
        share = sent[slot, 0] / load_E[expert]
        for k in range(waking_K.size):
            tokens = min(share * load_EK[expert, k], left[expert, k])
            if waking_K[k] > 0:
                send(layer, slot, k, tokens)
                continue
            load[home[expert], k] -= tokens
            load[device[slot], k] += tokens
            on_replica[slot, k] += tokens
            left[expert, k] -= tokens
    relax(layer, FIRST_SWEEPS)
    return layer


@njit(cache=True, nogil=True)
def fork(layer: Layer) -> Layer:
    """A copy whose replicas and loads can be changed."""
    return Layer(
        layer.held.copy(), layer.device, layer.first, layer.home, layer.on_replica.copy(), layer.at_home.copy(),
        layer.load.copy(), layer.waking, layer.changed,
    )  # fmt: skip


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
    held, home, on_replica, changed = layer.held, layer.home, layer.on_replica, layer.changed
    num_devices, num_scenarios = layer.load.shape
    device, old = layer.device[slot], held[slot]
    for other in range(num_devices):  # the first sweep visits the slot's device and the two homes alone
        changed[other] = 0 if other in (device, home[expert]) or (old >= 0 and other == home[old]) else -1
    if old >= 0:
        for k in range(num_scenarios):
            send(layer, slot, k, -on_replica[slot, k])
    held[slot] = expert
    relax(layer, SWEEPS)


@njit(cache=True, nogil=True)
def send(layer: Layer, slot: int, k: int, tokens: np.float32) -> None:
    """Sends tokens of a scenario from an expert's home to a replica, or back if negative, in place."""
    expert, waking = layer.held[slot], layer.waking[k]
    here, there = layer.home[expert], layer.device[slot]
    active = (layer.at_home[expert, k] > 0, layer.on_replica[slot, k] > 0)
    layer.at_home[expert, k] -= tokens
    layer.on_replica[slot, k] += tokens
    layer.load[here, k] -= tokens
    layer.load[there, k] += tokens
    if waking > 0:
        layer.load[here, k] += waking * (np.float32(layer.at_home[expert, k] > 0) - np.float32(active[0]))
        layer.load[there, k] += waking * (np.float32(layer.on_replica[slot, k] > 0) - np.float32(active[1]))


@njit(cache=True, nogil=True)
def _best_flow(layer: Layer, slot: int, k: int) -> np.float32:
    """Tokens to send to a replica so that the slower of its device and the expert's home is fastest, by prices.

    The whole expert is computed on one of both, unless a second active slot makes the slower one faster and that one is
    slower than the mean device.
    """
    expert, waking = layer.held[slot], layer.waking[k]
    left, sent = layer.at_home[expert, k], layer.on_replica[slot, k]
    tokens = left + sent
    if tokens <= 0:
        return np.float32(0)
    here = layer.load[layer.home[expert], k] - (left + waking if left > 0 else np.float32(0))
    there = layer.load[layer.device[slot], k] - (sent + waking if sent > 0 else np.float32(0))
    at_home, at_replica = max(here + tokens + waking, there), max(here, there + tokens + waking)
    best = np.float32(0) if at_home <= at_replica else tokens
    slower = min(at_home, at_replica)
    part = np.float32(0.5) * (here + tokens - there)
    if slower > 1 and 0 < part < tokens and there + part + waking < slower:
        best = part
    return np.float32(best - sent)


@njit(cache=True, nogil=True)
def _flow_by_price(layer: Layer, slot: int) -> np.float32:
    """Lets tokens flow between a replica and its expert's home, by prices of active slots; returns the largest flow."""
    most = np.float32(0)
    for k in range(layer.waking.size):
        flow = _best_flow(layer, slot, k)
        if flow != 0:
            send(layer, slot, k, flow)
            most = max(most, abs(flow))
    return most


@njit(cache=True, nogil=True, fastmath=True)
def _flow(layer: Layer, slot: int) -> np.float32:
    """As `_flow_by_price` where active slots have no price: half of the difference of the two devices."""
    on_replica, at_home, load = layer.on_replica, layer.at_home, layer.load
    expert, there, most = layer.held[slot], layer.device[slot], np.float32(0)
    here = layer.home[expert]
    for k in range(load.shape[1]):
        flow = np.float32(0.5) * (load[here, k] - load[there, k])  # negative: tokens return home
        flow = min(max(flow, -on_replica[slot, k]), at_home[expert, k])
        load[here, k] -= flow
        load[there, k] += flow
        on_replica[slot, k] += flow
        at_home[expert, k] -= flow
        most = max(most, abs(flow))
    return most


@njit(cache=True, nogil=True)
def relax(layer: Layer, sweeps: int) -> None:
    """Lets tokens flow between homes and replicas towards equal loads, in place, until hardly any flow is left.

    Sweep n visits the devices whose `changed` is at least n.
    """
    held, device, home, changed, priced = layer.held, layer.device, layer.home, layer.changed, layer.waking[0] > 0
    for sweep in range(sweeps):
        moved = False
        for slot in range(held.size):
            if held[slot] < 0:
                continue
            here, there = home[held[slot]], device[slot]
            if max(changed[here], changed[there]) < sweep:
                continue
            most = _flow_by_price(layer, slot) if priced else _flow(layer, slot)
            if most > NO_FLOW:
                changed[here] = changed[there] = sweep + 1
                moved = True
        if not moved:
            break


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
