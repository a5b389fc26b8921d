"""Compiled local search in which homes move as well: for engines that copy weights from any slot.

With few replica slots, replicas alone do not make up for loads that drift away from the homes. Here a home is only a
label: the copy of an expert with most tokens is its home, so that any other copy may be overwritten, and relabelling
moves no weights. Two kinds of changes are tried: a copy in place of a replica, as in runtime.balancing.local_search,
and an exchange of two experts between devices, which is two moves. The change that saves most for a move is taken.

Two devices without replica slots, experts 0 and 1 on the first, loads [.9, .7 | .3, .1] in units of the mean device
load. Experts 1 and 3 exchanged make both loads 1:

    >>> load = np.array([[[0.9], [0.7], [0.3], [0.1]]], dtype=np.float32)
    >>> sure, free = np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32)
    >>> home, replica, factor = np.array([[0, 1, 2, 3]]), np.zeros((1, 0), np.int64), np.ones((2, 2), dtype=np.float32)
    >>> row, home, saved = improve(home, home, replica, 2, load, free[None], sure, free, factor, 2)
    >>> row.tolist(), home.tolist(), round(float(saved[0]), 3)
    ([[0, 3, 2, 1]], [[0, 3, 2, 1]], 0.78)

Shape suffixes: L MoE layers, K scenarios, E experts, R replica slots in device order, P = E + R slots, G devices, N
candidates. An item is an expert's home, 0..E-1, or a replica slot, E..E+R-1.
"""

import numpy as np
from numba import njit

from data.arrays import Float32Array, IntArray
from runtime.balancing.candidates import Effort, candidates, insert
from runtime.balancing.local_search import filled
from runtime.balancing.water_filling import FIRST_SWEEPS, Layer, copy, fork, relax, replace, score

WORK = 1_200_000
"""Work allowed on one layer before one batch: trials, times replica slots and devices, times scenarios and six."""
MOVING_PRICE = 4.5
"""Price of a move, relative to one where homes stay: every slot may change, so more moves are found. Where every device
has a replica slot, copies that are placed at once keep the usual price, because they alone balance a changed load."""
EFFORT = Effort(16, 16, 12, 8)
"""Search for one copy; as many exchanges of two experts are relaxed."""
HOT = 4
"""Most loaded devices whose experts are considered for an exchange."""


@njit(cache=True, nogil=True)
def improve(
    phy2log_LP: IntArray,
    home_LE: IntArray,
    replica_LR: IntArray,
    num_devices: int,
    load_LEK: Float32Array,
    waking_LK: Float32Array,
    weight_K: Float32Array,
    price_L: Float32Array,
    factor_GG: Float32Array,
    max_moves: int,
) -> tuple[IntArray, IntArray, Float32Array]:
    """Improves homes and replicas of all layers.

    Args:
        phy2log_LP: Expert in each slot, -1 where empty.
        home_LE: Home slot of each expert.
        replica_LR: The replica slots, ascending.
        num_devices: G.
        load_LEK: Load of each expert in each scenario.
        waking_LK: Price of an active slot in each scenario, in the units of loads.
        weight_K: Weight of each scenario; they sum to 1.
        price_L: Least score that a move must save.
        factor_GG: Factor to the price of a move from one device to another, at least 1.
        max_moves: Most slots of a layer that may change.

    Returns:
        The improved experts of the slots `[L, P]`, home slots `[L, E]`, and the score that each layer saves, prices not
        subtracted, `[L]`.
    """
    planned, homes = phy2log_LP.copy(), home_LE.copy()
    gain = np.zeros(len(phy2log_LP), dtype=np.float32)
    slots_per_device = phy2log_LP.shape[1] // num_devices
    trials = WORK // ((replica_LR.shape[1] + num_devices) * (6 + weight_K.size))
    fill_price, price = price_L.copy(), np.float32(MOVING_PRICE) * price_L
    if replica_LR.shape[1] < num_devices:
        fill_price[:] = price
    for i in range(len(phy2log_LP)):
        held, home = phy2log_LP[i][replica_LR[i]], home_LE[i] // slots_per_device
        first = _first(replica_LR[i] // slots_per_device, num_devices)
        layer, before, placed = filled(
            held, first, home, load_LEK[i], waking_LK[i], weight_K, fill_price[i], factor_GG, max_moves
        )
        slot_P = np.concatenate((home_LE[i], replica_LR[i]))
        gain[i] = before - _search(layer, slot_P, weight_K, price[i], factor_GG, max_moves - placed, trials)
        _write(layer, slot_P, planned[i], homes[i], slots_per_device)
    return planned, homes, gain


@njit(cache=True, nogil=True)
def _search(
    layer: Layer,
    slot_P: IntArray,
    weight_K: Float32Array,
    price: float,
    factor_GG: Float32Array,
    max_moves: int,
    trials: int,
) -> np.float32:
    """Improves a relaxed layer and the slots of its items in place; returns its score."""
    scratch = _movable_fork(layer)
    current, moves = score(layer.load, weight_K), 0
    while moves < max_moves and trials > 0 and current > price:
        _label_homes(layer, slot_P, weight_K)
        scratch.device[:] = layer.device
        scratch.home[:] = layer.home
        best, slot, expert, one, other = np.float32(0), -1, -1, -1, -1
        slots, experts = candidates(layer, weight_K, EFFORT)
        for i in range(slots.size):
            copy(layer, scratch, experts[i])
            replace(scratch, slots[i], experts[i])
            relax(scratch, FIRST_SWEEPS)
            factor = factor_GG[layer.home[experts[i]], layer.device[slots[i]]]
            gain = current - score(scratch.load, weight_K) - price * factor
            if gain > best:
                best, slot, expert = gain, slots[i], experts[i]
        ones, others = _exchanges(layer, weight_K, EFFORT.most if moves + 2 <= max_moves else 0)
        for i in range(ones.size):
            _copy_for_exchange(layer, scratch, ones[i], others[i])
            _exchange(scratch, ones[i], others[i])
            factor = factor_GG[_device(layer, ones[i]), _device(layer, others[i])]
            gain = (current - score(scratch.load, weight_K)) / 2 - price * factor
            _swap_devices(scratch, ones[i], others[i])
            if gain > best:
                best, one, other = gain, ones[i], others[i]
        trials -= slots.size + ones.size
        if one >= 0:
            _exchange(layer, one, other)
            slot_P[one], slot_P[other] = slot_P[other], slot_P[one]
            _sort(layer, slot_P)
            moves += 2
        elif slot >= 0:
            replace(layer, slot, expert)
            relax(layer, FIRST_SWEEPS)
            moves += 1
        else:
            break
        current = score(layer.load, weight_K)
    return current


@njit(cache=True, nogil=True)
def _movable_fork(layer: Layer) -> Layer:
    """A copy whose homes and replica slots can change their devices as well."""
    same = fork(layer)
    return Layer(
        same.held, layer.device.copy(), layer.first, layer.home.copy(), same.on_replica, same.at_home, same.load,
        layer.waking, layer.changed,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _label_homes(layer: Layer, slot_P: IntArray, weight_K: Float32Array) -> None:
    """Makes the copy with most tokens each expert's home, in place."""
    num_experts, moved = layer.home.size, False
    for r in range(layer.held.size):
        expert = layer.held[r]
        if expert < 0 or (layer.on_replica[r] * weight_K).sum() <= (layer.at_home[expert] * weight_K).sum():
            continue
        for k in range(weight_K.size):
            layer.at_home[expert, k], layer.on_replica[r, k] = layer.on_replica[r, k], layer.at_home[expert, k]
        _swap_devices(layer, expert, num_experts + r)
        slot_P[expert], slot_P[num_experts + r] = slot_P[num_experts + r], slot_P[expert]
        moved = True
    if moved:
        _sort(layer, slot_P)


@njit(cache=True, nogil=True)
def _exchanges(layer: Layer, weight_K: Float32Array, count: int) -> tuple[IntArray, IntArray]:
    """At most `count` pairs of items worth exchanging, `[N]` and `[N]`, most promising first.

    The gain is the squared device load that the exchange saves in the mean of all scenarios: a flow f across a
    difference d saves 2 f (d - f).
    """
    expert_P, device_P, tokens_P = _items(layer, weight_K)
    holds = np.zeros((len(layer.load), layer.home.size), dtype=np.bool_)
    for item in range(expert_P.size):
        if expert_P[item] >= 0:
            holds[device_P[item], expert_P[item]] = True
    load_G, over_G = _load_and_overload(layer, weight_K)
    gains = np.zeros(count, dtype=np.float32)
    ones, others = np.full(count, -1), np.full(count, -1)
    for hot in np.argsort(-over_G)[: HOT if count else 0]:
        for one in range(expert_P.size):
            x = expert_P[one]
            if device_P[one] != hot or x < 0 or over_G[hot] <= 0:
                continue
            for other in range(expert_P.size):
                y, device = expert_P[other], device_P[other]
                flow = tokens_P[one] - tokens_P[other]
                gain = 2 * flow * (load_G[hot] - load_G[device] - flow)
                if gain > gains[-1] and y >= 0 and not holds[hot, y] and not holds[device, x]:
                    insert(gain, one, other, gains, ones, others)
    found = 0
    while found < count and ones[found] >= 0:
        found += 1
    return ones[:found], others[:found]


@njit(cache=True, nogil=True)
def _items(layer: Layer, weight_K: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
    """Expert, device and mean tokens of each item, `[P]`."""
    num_experts = layer.home.size
    tokens_P = np.zeros(num_experts + layer.held.size, dtype=np.float32)
    for k in range(weight_K.size):
        tokens_P[:num_experts] += weight_K[k] * layer.at_home[:, k]
        tokens_P[num_experts:] += weight_K[k] * layer.on_replica[:, k]
    return np.concatenate((np.arange(num_experts), layer.held)), np.concatenate((layer.home, layer.device)), tokens_P


@njit(cache=True, nogil=True)
def _load_and_overload(layer: Layer, weight_K: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Mean load of each device, and mean square of what it has above the mean device, `[G]`."""
    load_G, over_G = np.zeros(len(layer.load), dtype=np.float32), np.zeros(len(layer.load), dtype=np.float32)
    for device in range(load_G.size):
        for k in range(weight_K.size):
            over = max(layer.load[device, k] - np.float32(1), np.float32(0))
            load_G[device] += weight_K[k] * layer.load[device, k]
            over_G[device] += weight_K[k] * over * over
    return load_G, over_G


@njit(cache=True, nogil=True)
def _expert(layer: Layer, item: int) -> int:
    return item if item < layer.home.size else int(layer.held[item - layer.home.size])


@njit(cache=True, nogil=True)
def _device(layer: Layer, item: int) -> int:
    return int(layer.home[item] if item < layer.home.size else layer.device[item - layer.home.size])


@njit(cache=True, nogil=True)
def _tokens(layer: Layer, item: int, k: int) -> np.float32:
    if item < layer.home.size:
        return np.float32(layer.at_home[item, k])
    return np.float32(layer.on_replica[item - layer.home.size, k])


@njit(cache=True, nogil=True)
def _swap_devices(layer: Layer, one: int, other: int) -> None:
    """Gives each item the other's device, in place; loads stay as they are."""
    num_experts, first, second = layer.home.size, _device(layer, one), _device(layer, other)
    for item, device in ((one, second), (other, first)):
        if item < num_experts:
            layer.home[item] = device
        else:
            layer.device[item - num_experts] = device


@njit(cache=True, nogil=True)
def _exchange(layer: Layer, one: int, other: int) -> None:
    """Exchanges two items between their devices with the tokens in them, and relaxes, in place."""
    first, second = _device(layer, one), _device(layer, other)
    for k in range(layer.waking.size):
        tokens, back = _tokens(layer, one, k), _tokens(layer, other, k)
        flow = tokens - back + layer.waking[k] * (np.float32(tokens > 0) - np.float32(back > 0))
        layer.load[first, k] -= flow
        layer.load[second, k] += flow
    _swap_devices(layer, one, other)
    for device in range(len(layer.load)):
        layer.changed[device] = 0 if device in (first, second) else -1
    relax(layer, FIRST_SWEEPS)


@njit(cache=True, nogil=True)
def _copy_for_exchange(layer: Layer, scratch: Layer, one: int, other: int) -> None:
    """Makes the scratch equal to the layer for a trial that exchanges two items."""
    copy(layer, scratch, _expert(layer, one))
    expert = _expert(layer, other)
    for k in range(layer.waking.size):
        scratch.at_home[expert, k] = layer.at_home[expert, k]


@njit(cache=True, nogil=True)
def _first(device_R: IntArray, num_devices: int) -> IntArray:
    """First replica slot of each device, and R at the end, `[G + 1]`."""
    first = np.zeros(num_devices + 1, dtype=np.int64)
    for device in device_R:
        first[device + 1] += 1
    return np.cumsum(first)


@njit(cache=True, nogil=True)
def _sort(layer: Layer, slot_P: IntArray) -> None:
    """Brings the replica slots into ascending order again, in place."""
    num_experts = layer.home.size
    order = np.argsort(slot_P[num_experts:])
    slot_P[num_experts:] = slot_P[num_experts:][order]
    layer.held[:], layer.device[:] = layer.held[order], layer.device[order]
    layer.on_replica[:] = layer.on_replica[order]
    layer.first[:] = _first(layer.device, len(layer.load))


@njit(cache=True, nogil=True)
def _write(layer: Layer, slot_P: IntArray, row_P: IntArray, home_E: IntArray, slots_per_device: int) -> None:
    """Writes a layer's experts and home slots in place; experts that stay on a device keep their slots there."""
    old_P, item_P = row_P.copy(), np.empty_like(row_P)
    for item in range(slot_P.size):
        item_P[slot_P[item]] = item
        row_P[slot_P[item]] = _expert(layer, item)
    for slot in range(row_P.size):
        begin = slot // slots_per_device * slots_per_device
        there = begin
        while there < begin + slots_per_device:
            if there != slot and row_P[slot] >= 0 and old_P[there] == row_P[slot]:
                row_P[slot], row_P[there] = row_P[there], row_P[slot]
                item_P[slot], item_P[there] = item_P[there], item_P[slot]
                there = begin - 1  # the slot holds another expert now, which may belong elsewhere too
            there += 1
    for slot in range(row_P.size):
        if item_P[slot] < home_E.size:
            home_E[item_P[slot]] = slot
