"""Compiled choice of active slots: a split where a device's time is a price for each active slot plus its tokens.

An exact choice would be a mixed-integer program. `few_slots` begins with one active slot for each expert and relieves
the slowest device, by local search. The caller levels the tokens of the chosen slots afterwards.

Two devices, two experts with a copy on each, a price of 10: both copies of expert 0 would be active if tokens alone
counted, and each device would take 10 + 50 + 10 or more. One active slot each is faster:

    >>> from runtime.balancing.leveling import copies_by_expert
    >>> phy2log, tokens = np.array([0, 1, 1, 0]), np.array([54, 46])
    >>> copies = copies_by_expert(phy2log, 2, 2, 2)
    >>> flow = few_slots(tokens, np.zeros(4, dtype=np.int64), phy2log, copies, 2, 10)
    >>> flow.quota.tolist(), flow.load.tolist()
    ([0, 46, 0, 54], [56, 64])

Shape suffixes: E experts, P slots, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import IntArray
from runtime.balancing.leveling import Copies, Flow, level


@njit(cache=True, nogil=True)
def few_slots(
    total_E: IntArray, own_P: IntArray, phy2log: IntArray, copies: Copies, num_devices: int, overhead: int
) -> Flow:
    """A split that makes a second slot of an expert active only where that relieves the slowest device.

    It begins with one active slot for each expert, chosen in two ways; the faster result is returned.

    Args:
        total_E: Tokens of each expert.
        own_P: Tokens of each slot's expert that come from the slot's device.
        phy2log: Expert in each slot, -1 where empty, `[P]`.
        copies: Groups of slots by expert.
        num_devices: G.
        overhead: Price of an active slot, in tokens.
    """
    greedy = _one_by_one(total_E, own_P, phy2log, copies, num_devices, overhead)
    rounded = _rounded(total_E, own_P, phy2log, copies, num_devices, overhead)
    _relieve(greedy, copies, overhead)
    _relieve(rounded, copies, overhead)
    flow = greedy if greedy.load.max() < rounded.load.max() else rounded
    return Flow(flow.quota, np.minimum(own_P, flow.quota), flow.load, flow.quota > 0)


@njit(cache=True, nogil=True)
def _relieve(flow: Flow, copies: Copies, overhead: int) -> None:
    """Moves experts of the slowest device to others of their slots, in whole or in part, while that helps, in place.

    An expert of the device that takes the tokens may have to move on to a third one.
    """
    for _ in range(flow.quota.size):
        heavy = int(np.argmax(flow.load))
        leave, enter, tokens = _relief(flow, copies, heavy, flow.load[heavy], overhead)
        if leave >= 0:
            _add(flow, leave, -tokens, overhead)
            _add(flow, enter, tokens, overhead)
        elif not _pass_on(flow, copies, heavy, overhead):
            break


@njit(cache=True, nogil=True)
def _one_by_one(
    total_E: IntArray, own_P: IntArray, phy2log: IntArray, copies: Copies, num_devices: int, overhead: int
) -> Flow:
    """One active slot for each expert, first for experts with one slot.

    Then come the others, from the most to the least loaded, each on the device that takes least time.
    """
    slots_per_device = phy2log.size // num_devices
    flow = _nothing(own_P, num_devices)
    alone, firsts = slots_with_and_without_copies(copies)
    for slot in alone:
        _add(flow, slot, total_E[phy2log[slot]], overhead)
    for i in np.argsort(-total_E[phy2log[firsts]], kind="mergesort"):
        best = firsts[i]
        for j in range(copies.begin[best], copies.end[best]):
            if flow.load[copies.slots[j] // slots_per_device] < flow.load[best // slots_per_device]:
                best = copies.slots[j]
        _add(flow, best, total_E[phy2log[best]], overhead)
    return flow


@njit(cache=True, nogil=True)
def _rounded(
    total_E: IntArray, own_P: IntArray, phy2log: IntArray, copies: Copies, num_devices: int, overhead: int
) -> Flow:
    """One active slot for each expert: the one with most of the expert in a split where prices can be divided."""
    slots_per_device = phy2log.size // num_devices
    divided, flow = _nothing(np.zeros_like(own_P), num_devices), _nothing(own_P, num_devices)
    for slot in copies.slots:
        first, expert = copies.slots[copies.begin[slot]], phy2log[slot]
        if slot == first and total_E[expert] > 0:
            divided.quota[slot] = total_E[expert] + overhead
            divided.load[slot // slots_per_device] += total_E[expert] + overhead
    level(divided, copies, copies, False, 0)
    for first in copies.slots:
        if copies.slots[copies.begin[first]] == first:
            best = first
            for j in range(copies.begin[first], copies.end[first]):
                if divided.quota[copies.slots[j]] > divided.quota[best]:
                    best = copies.slots[j]
            _add(flow, best, total_E[phy2log[first]], overhead)
    return flow


@njit(cache=True, nogil=True)
def _nothing(own_P: IntArray, num_devices: int) -> Flow:
    """A split of no tokens."""
    return Flow(np.zeros_like(own_P), own_P, np.zeros(num_devices, np.int64), np.ones(own_P.size, np.bool_))


@njit(cache=True, nogil=True)
def _pass_on(flow: Flow, copies: Copies, heavy: int, overhead: int) -> bool:
    """Moves a whole expert from the slowest device to another one, which passes tokens on to a third one, in place.

    Returns:
        Whether such moves make the slowest device faster; without any, the split stays as it is.
    """
    slots_per_device = flow.quota.size // flow.load.size
    slowest = least = flow.load[heavy]
    best = np.full(4, -1)  # the slots that tokens leave and enter, twice
    best_tokens = 0
    for leave in range(heavy * slots_per_device, (heavy + 1) * slots_per_device):
        moved = flow.quota[leave]
        if copies.begin[leave] < 0 or moved == 0 or flow.load[heavy] - moved - overhead >= least:
            continue
        for i in range(copies.begin[leave], copies.end[leave]):
            enter = copies.slots[i]
            if enter // slots_per_device == heavy:
                continue
            _add(flow, leave, -moved, overhead)
            _add(flow, enter, moved, overhead)
            then_leave, then_enter, tokens = _relief(flow, copies, enter // slots_per_device, least, overhead)
            if then_leave >= 0:
                _add(flow, then_leave, -tokens, overhead)
                _add(flow, then_enter, tokens, overhead)
                reached = max(
                    flow.load[heavy], flow.load[enter // slots_per_device], flow.load[then_enter // slots_per_device]
                )
                _add(flow, then_enter, -tokens, overhead)
                _add(flow, then_leave, tokens, overhead)
                if reached < least:
                    least, best_tokens = reached, tokens
                    best[:] = leave, enter, then_leave, then_enter
            _add(flow, enter, -moved, overhead)
            _add(flow, leave, moved, overhead)
    if least == slowest:
        return False
    moved = flow.quota[best[0]]
    _add(flow, best[0], -moved, overhead)
    _add(flow, best[1], moved, overhead)
    _add(flow, best[2], -best_tokens, overhead)
    _add(flow, best[3], best_tokens, overhead)
    return True


@njit(cache=True, nogil=True)
def _relief(flow: Flow, copies: Copies, heavy: int, least: int, overhead: int) -> tuple[int, int, int]:
    """The shift of tokens from a device after which the slower one of both devices is fastest, if faster than `least`.

    Returns:
        The slot that tokens leave, or -1; the slot that they enter; tokens.
    """
    slots_per_device = flow.quota.size // flow.load.size
    best_leave, best_enter, best_tokens = -1, -1, 0
    for leave in range(heavy * slots_per_device, (heavy + 1) * slots_per_device):
        if copies.begin[leave] < 0 or flow.quota[leave] == 0:
            continue
        for i in range(copies.begin[leave], copies.end[leave]):
            enter = copies.slots[i]
            if enter // slots_per_device == heavy:
                continue
            there = flow.load[enter // slots_per_device] + (0 if flow.quota[enter] > 0 else overhead)
            for tokens in (min((flow.load[heavy] - there) // 2, flow.quota[leave]), flow.quota[leave]):
                here = flow.load[heavy] - tokens - (overhead if tokens == flow.quota[leave] else 0)
                if tokens > 0 and max(here, there + tokens) < least:
                    least, best_leave, best_enter, best_tokens = max(here, there + tokens), leave, enter, tokens
    return best_leave, best_enter, best_tokens


@njit(cache=True, nogil=True)
def _add(flow: Flow, slot: int, tokens: int, overhead: int) -> None:
    """Adds tokens to a slot, or takes them away, with the time of becoming active or inactive, in place."""
    device = slot // (flow.quota.size // flow.load.size)
    before = flow.quota[slot]
    flow.quota[slot] = before + tokens
    flow.load[device] += tokens + overhead * (int(before + tokens > 0) - int(before > 0))


@njit(cache=True, nogil=True)
def slots_with_and_without_copies(copies: Copies) -> tuple[IntArray, IntArray]:
    """The slots whose expert has no other slot, and the first slot of each other expert."""
    only, firsts = np.empty(copies.slots.size, dtype=np.int64), np.empty(copies.slots.size, dtype=np.int64)
    alone, several = 0, 0
    for i, slot in enumerate(copies.slots):
        if copies.end[slot] - copies.begin[slot] == 1:
            only[alone] = slot
            alone += 1
        elif copies.begin[slot] == i:
            firsts[several] = slot
            several += 1
    return only[:alone], firsts[:several]
