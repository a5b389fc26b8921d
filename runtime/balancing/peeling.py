"""Compiled first split of experts with several slots: leaves first, so that few chains are left to the max-flow.

Devices and experts with copies form a graph whose edges are slots. Where replica slots are few it consists of trees and
a few cycles. A device with a single open slot can take tokens of one expert only, so it takes as many as fit below the
target; an expert with a single open slot puts all its tokens there. Each such slot is closed, which makes new leaves.
On a tree no split does better. On a cycle an open slot is chosen without certainty, and the max-flow
(runtime.balancing.leveling) corrects it.

Three devices with two slots each; expert 0 (8 tokens) has copies on devices 0 and 1, expert 1 (4) on devices 1 and 2.
Devices 0 and 2 are leaves and take 4 tokens each, so that 4 are left for device 1:

    >>> from runtime.balancing.leveling import copies_by_expert
    >>> phy2log = np.array([0, -1, 1, 0, 2, 1])
    >>> copies = copies_by_expert(phy2log, 3, 3, 3)
    >>> zero, load = np.zeros(6, dtype=np.int64), np.zeros(3, dtype=np.int64)
    >>> flow = Flow(zero.copy(), zero, load, np.ones(6, dtype=np.bool_))
    >>> peel(flow, copies, np.array([8, 4, 0]), phy2log, 4)
    >>> flow.quota.tolist(), flow.load.tolist()
    ([4, 0, 0, 4, 0, 4], [4, 4, 4])

Shape suffixes: E experts, P slots, N slots that hold an expert, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import BoolArray, IntArray
from runtime.balancing.leveling import Copies, Flow


@njit(cache=True, nogil=True)
def peel(flow: Flow, copies: Copies, left_E: IntArray, phy2log: IntArray, target: int) -> None:
    """Gives tokens to the slots of experts with several slots, in place; devices go above the target only if they must.

    Arrays are taken out of their tuples once, because numba counts references at each access: eight times the time.

    Args:
        flow: The split without these tokens.
        copies: Groups of slots by expert.
        left_E: Tokens to give.
        phy2log: Expert in each slot, -1 where empty, `[P]`.
        target: Device time.
    """
    quota_P, load_G = flow.quota, flow.load
    slots_N, device_N, begin_P, end_P = copies
    num_devices, slots_per_device = load_G.size, quota_P.size // load_G.size
    open_P, open_G, open_N, left_N = _open_slots(num_devices, copies, left_E, phy2log)
    leaves = np.empty(num_devices + slots_N.size, dtype=np.int64)  # devices and, G added, groups with one open slot
    size = 0
    for device in range(num_devices):
        if open_G[device] == 1:
            leaves[size] = device
            size += 1
    next_group = 0
    while True:
        if size > 0:
            size -= 1
            device, group = leaves[size], leaves[size] - num_devices
            if group >= 0 and open_N[group] == 1:
                i = _least_loaded(group, end_P[slots_N[group]], slots_N, device_N, open_P, load_G)
                slot, device = slots_N[i], device_N[i]
            elif group < 0 and open_G[device] == 1:
                slot = device * slots_per_device
                while not open_P[slot]:
                    slot += 1
                group = begin_P[slot]
            else:
                continue
        else:
            while next_group < slots_N.size and open_N[next_group] == 0:
                next_group += 1
            if next_group == slots_N.size:
                break
            group = next_group
            i = _least_loaded(group, end_P[slots_N[group]], slots_N, device_N, open_P, load_G)
            slot, device = slots_N[i], device_N[i]
        tokens = left_N[group]
        if open_N[group] > 1:
            tokens = min(tokens, max(target - load_G[device], 0))
        quota_P[slot] += tokens
        load_G[device] += tokens
        left_N[group] -= tokens
        size = _close(slot, device, group, open_P, open_G, open_N, leaves, size)
        for i in range(group, end_P[slot] if left_N[group] == 0 else group):
            if open_P[slots_N[i]]:
                size = _close(slots_N[i], device_N[i], group, open_P, open_G, open_N, leaves, size)
        first = device * slots_per_device
        for other in range(first, first + slots_per_device if load_G[device] >= target else first):
            if open_P[other] and open_N[begin_P[other]] > 1:
                size = _close(other, device, begin_P[other], open_P, open_G, open_N, leaves, size)


@njit(cache=True, nogil=True)
def _open_slots(
    num_devices: int, copies: Copies, left_E: IntArray, phy2log: IntArray
) -> tuple[BoolArray, IntArray, IntArray, IntArray]:
    """Slots that may get tokens, `[P]`, and their number on each device, `[G]`, and for each expert, `[N]`.

    The last array has the tokens of each expert, `[N]`; an expert's figures are where its group begins.
    """
    slots_N, device_N, begin_P, end_P = copies
    open_P, open_G = np.zeros(phy2log.size, dtype=np.bool_), np.zeros(num_devices, dtype=np.int64)
    open_N, left_N = np.zeros(slots_N.size, dtype=np.int64), np.zeros(slots_N.size, dtype=np.int64)
    for i, slot in enumerate(slots_N):
        group, tokens = begin_P[slot], left_E[phy2log[slot]]
        if end_P[slot] - group > 1 and tokens > 0:
            open_P[slot], left_N[group] = True, tokens
            open_G[device_N[i]] += 1
            open_N[group] += 1
    return open_P, open_G, open_N, left_N


@njit(cache=True, nogil=True)
def _least_loaded(
    begin: int, end: int, slots_N: IntArray, device_N: IntArray, open_P: BoolArray, load_G: IntArray
) -> int:
    """Where in `Copies.slots` the open slot of a group is whose device has the least load."""
    best, least = -1, np.int64(0)
    for i in range(begin, end):
        if open_P[slots_N[i]] and (best < 0 or load_G[device_N[i]] < least):
            best, least = i, load_G[device_N[i]]
    return best


@njit(cache=True, nogil=True)
def _close(
    slot: int, device: int, group: int, open_P: BoolArray, open_G: IntArray, open_N: IntArray, leaves: IntArray,
    size: int,
) -> int:  # fmt: skip
    """Closes a slot, in place; its device or group is a leaf if it has one left. Returns their number."""
    open_P[slot] = False
    open_G[device] -= 1
    open_N[group] -= 1
    if open_G[device] == 1:
        leaves[size] = device
        size += 1
    if open_N[group] == 1:
        leaves[size] = open_G.size + group
        size += 1
    return size
