"""The split as a flow: compiled integer kernels behind `runtime.balancing.split`.

Tokens of an expert may lie on any device that holds a copy. Starting from a split in which every token stays where it
is, the most loaded device sheds tokens along chains of copies (expert a from device 0 to 3, expert b from 3 to 5, ...)
to a device with room, until no chain leads from it to a device with at least two tokens less. No split is then better:
the devices the chains reach hold only tokens that no other device can take. Chains are searched breadth first
(shortest augmenting paths, Edmonds and Karp 1972); those that carry away no token from its own device come first.

numba compiles these loops once and caches them; they hold no lock while they run. They are written out, without array
expressions, because those took twice as long to compile.

Shape suffixes: S source devices, E experts, P slots, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import BoolArray, IntArray


@njit(cache=True, nogil=True)
def slots_by_expert(phy2log: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """Slots `[copies]` sorted by expert, and where each expert's begin, `[E + 1]`."""
    start = np.zeros(num_experts + 1, dtype=np.int64)
    for expert in phy2log:
        if expert >= 0:
            start[expert + 1] += 1
    for expert in range(num_experts):
        start[expert + 1] += start[expert]
    slots = np.empty(start[-1], dtype=np.int64)
    fill = start[:-1].copy()
    for slot, expert in enumerate(phy2log):
        if expert >= 0:
            slots[fill[expert]] = slot
            fill[expert] += 1
    return start, slots


@njit(cache=True, nogil=True)
def even(counts_SE: IntArray, phy2log: IntArray) -> IntArray:
    """Even quotas `[S, P]`; which slots take the odd tokens turns with the source."""
    num_sources, num_experts = counts_SE.shape
    start, slots = slots_by_expert(phy2log, num_experts)
    quota = np.zeros((num_sources, phy2log.size), dtype=np.int64)
    for source in range(num_sources):
        for expert in range(num_experts):
            copies = start[expert + 1] - start[expert]
            each, odd = divmod(counts_SE[source, expert], copies)
            for k in range(copies):
                quota[source, slots[start[expert] + k]] = each + (1 if (k + source) % copies < odd else 0)
    return quota


@njit(cache=True, nogil=True)
def deal(
    counts_SE: IntArray, quota_P: IntArray, start: IntArray, slots: IntArray, num_devices: int, node: int
) -> IntArray:
    """Deals each source's tokens into the slots' quotas: own device first, then own node, then in order, `[S, P]`."""
    num_sources = counts_SE.shape[0]
    per_device = quota_P.size // num_devices
    dealt = np.zeros((num_sources, quota_P.size), dtype=np.int64)
    room_P = quota_P.copy()
    for expert in range(counts_SE.shape[1]):
        first, last = start[expert], start[expert + 1]
        left_S = np.empty(num_sources, dtype=np.int64)
        for source in range(num_sources):
            left_S[source] = counts_SE[source, expert]
        for reach in (1, node, num_devices):
            for slot in slots[first:last]:
                for source in range(num_sources):
                    if num_sources == 1 or last - first == 1 or source // reach == slot // per_device // reach:
                        tokens = min(left_S[source], room_P[slot])
                        dealt[source, slot] += tokens
                        left_S[source] -= tokens
                        room_P[slot] -= tokens
            if last - first == 1:
                break
    return dealt


@njit(cache=True, nogil=True)
def quotas(
    counts_SE: IntArray, total_E: IntArray, phy2log: IntArray, num_devices: int, wake: int, node: int
) -> IntArray:
    """Quotas `[S, P]` of least greatest device time; see `runtime.balancing.split.split_by_quota`."""
    start, slots = slots_by_expert(phy2log, counts_SE.shape[1])
    local_P = _local(counts_SE, phy2log, num_devices)
    settled_P = np.zeros(phy2log.size, dtype=np.bool_)  # slots that need no trial, or have had one
    awake_P = np.ones(phy2log.size, dtype=np.bool_)
    quota_P, top = _balance(total_E, local_P, phy2log, start, slots, awake_P, num_devices, wake)
    while wake > 0:
        slot = _lightest(quota_P, settled_P, wake, phy2log, start)
        if slot < 0:
            break
        settled_P[slot] = True
        if _awake_copies(phy2log[slot], start, slots, awake_P) > 1:
            awake_P[slot] = False
            trial_P, trial = _balance(total_E, local_P, phy2log, start, slots, awake_P, num_devices, wake)
            if trial <= top:
                quota_P, top = trial_P, trial
            else:
                awake_P[slot] = True
    return deal(counts_SE, quota_P, start, slots, num_devices, node)


@njit(cache=True, nogil=True)
def _lightest(quota_P: IntArray, settled_P: BoolArray, most: int, phy2log: IntArray, start: IntArray) -> int:
    """The slot with fewest tokens, at most `most`, among the unsettled ones of experts with copies; or -1."""
    lightest = -1
    for slot, expert in enumerate(phy2log):
        if expert < 0 or settled_P[slot] or quota_P[slot] > most or start[expert + 1] - start[expert] < 2:
            continue
        if lightest < 0 or quota_P[slot] < quota_P[lightest]:
            lightest = slot
    return lightest


@njit(cache=True, nogil=True)
def _awake_copies(expert: int, start: IntArray, slots: IntArray, awake_P: BoolArray) -> int:
    copies = 0
    for i in range(start[expert], start[expert + 1]):
        copies += awake_P[slots[i]]
    return copies


@njit(cache=True, nogil=True)
def _local(counts_SE: IntArray, phy2log: IntArray, num_devices: int) -> IntArray:
    """Tokens that need not travel if they take this slot, `[P]`; a second copy on a device counts none."""
    per_device = phy2log.size // num_devices
    local_P = np.zeros(phy2log.size, dtype=np.int64)
    if counts_SE.shape[0] == 1:
        return local_P
    for slot, expert in enumerate(phy2log):
        first = expert >= 0
        for other in range(slot // per_device * per_device, slot):
            first = first and phy2log[other] != expert
        if first:
            local_P[slot] = counts_SE[slot // per_device, expert]
    return local_P


@njit(cache=True, nogil=True)
def _balance(
    total_E: IntArray,
    local_P: IntArray,
    phy2log: IntArray,
    start: IntArray,
    slots: IntArray,
    awake_P: BoolArray,
    num_devices: int,
    wake: int,
) -> tuple[IntArray, int]:
    """Tokens per slot `[P]` that make the greatest device time as small as whole tokens allow, and that time."""
    per_device = phy2log.size // num_devices
    quota_P = np.zeros(phy2log.size, dtype=np.int64)
    load_G = np.zeros(num_devices, dtype=np.int64)
    for slot in range(phy2log.size):  # stay at home first
        if awake_P[slot] and phy2log[slot] >= 0:
            quota_P[slot] = local_P[slot]
            load_G[slot // per_device] += local_P[slot] + (wake if total_E[phy2log[slot]] > 0 else 0)
    for expert in range(total_E.size):  # then those whose device has no copy: to the emptiest device that has
        rest, best = total_E[expert], -1
        for i in range(start[expert], start[expert + 1]):
            slot = slots[i]
            rest -= quota_P[slot]
            if awake_P[slot] and (best < 0 or load_G[slot // per_device] < load_G[best // per_device]):
                best = slot
        quota_P[best] += rest
        load_G[best // per_device] += rest
    nothing, everywhere = np.zeros(local_P.size, dtype=np.int64), np.ones(num_devices, dtype=np.bool_)
    floor = _mean(load_G, everywhere)  # no split has a smaller maximum
    while True:
        heavy = int(np.argmax(load_G))
        if load_G[heavy] <= floor:
            return quota_P, load_G[heavy]
        kept_P = local_P
        light, via, reached_G = _chain(heavy, floor, quota_P, kept_P, load_G, phy2log, start, slots, awake_P)
        if light < 0:
            kept_P = nothing
            light, via, reached_G = _chain(heavy, floor, quota_P, kept_P, load_G, phy2log, start, slots, awake_P)
        if light < 0:  # tokens on the devices reached cannot leave them, which gives a better floor
            floor = _mean(load_G, reached_G)
        else:
            _shed(heavy, light, floor, via, quota_P, kept_P, load_G)


@njit(cache=True, nogil=True)
def _mean(load_G: IntArray, among_G: BoolArray) -> int:
    """Mean load of some devices, rounded up."""
    total, devices = 0, 0
    for device in range(load_G.size):
        if among_G[device]:
            total += load_G[device]
            devices += 1
    return -(-total // devices)


@njit(cache=True, nogil=True)
def _chain(
    heavy: int,
    floor: int,
    quota_P: IntArray,
    kept_P: IntArray,
    load_G: IntArray,
    phy2log: IntArray,
    start: IntArray,
    slots: IntArray,
    awake_P: BoolArray,
) -> tuple[int, IntArray, BoolArray]:
    """Looks for the nearest device below the floor that the heavy one can shed tokens to, breadth first.

    Returns:
        The device, or -1; for each device reached, the slot its tokens leave and the slot they enter, `[G, 2]`; the
        devices reached, `[G]`.
    """
    num_devices = load_G.size
    per_device = phy2log.size // num_devices
    via = np.empty((num_devices, 2), dtype=np.int64)
    reached = np.zeros(num_devices, dtype=np.bool_)
    queue = np.empty(num_devices, dtype=np.int64)
    queue[0], head, tail = heavy, 0, 1
    reached[heavy] = True
    while head < tail:
        device = queue[head]
        head += 1
        for leave in range(device * per_device, (device + 1) * per_device):
            expert = phy2log[leave]
            if expert < 0 or quota_P[leave] <= kept_P[leave]:
                continue
            for i in range(start[expert], start[expert + 1]):
                enter = slots[i]
                other = enter // per_device
                if reached[other] or not awake_P[enter]:
                    continue
                reached[other] = True
                via[other, 0], via[other, 1] = leave, enter
                if load_G[other] < floor:
                    return other, via, reached
                queue[tail] = other
                tail += 1
    return -1, via, reached


@njit(cache=True, nogil=True)
def _shed(
    heavy: int, light: int, floor: int, via: IntArray, quota_P: IntArray, kept_P: IntArray, load_G: IntArray
) -> None:
    """Moves as many tokens along the chain as it carries, down to the floor at one end or up to it at the other."""
    per_device = quota_P.size // load_G.size
    tokens = min(load_G[heavy] - floor, floor - load_G[light])
    device = light
    while device != heavy:
        leave = via[device, 0]
        tokens = min(tokens, quota_P[leave] - kept_P[leave])
        device = leave // per_device
    device = light
    while device != heavy:
        leave, enter = via[device, 0], via[device, 1]
        quota_P[leave] -= tokens
        quota_P[enter] += tokens
        device = leave // per_device
    load_G[heavy] -= tokens
    load_G[light] += tokens
