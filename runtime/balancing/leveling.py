"""Compiled max-flow that levels devices: tokens move between copies until the largest device time is least.

An expert's tokens can be computed on any device that holds a copy. Devices above a target time shed tokens along chains
of copies (expert a from device 0 to 3, expert b from 3 to 5, ...) to devices below it. All shortest chains are used at
once, then all that are one copy longer, and so on (Dinic 1970). If a device is left above the target, no chain leads
from it to a device below, so the mean of the devices that its chains reach is a bound that no split can beat, and a
higher one: it becomes the target. The first target is the mean of all devices.

Three devices with two slots each; expert 0 has copies on devices 0 and 1, expert 1 on devices 1 and 2. The loads start
as [8, 4, 0], the mean is 4. Device 0 can give tokens of expert 0 only to device 1, which is at the mean already; device
1 can pass on tokens of expert 1 to device 2. So 4 tokens of expert 0 move from device 0 to 1 and, in the same step, 4
tokens of expert 1 from device 1 to 2; the loads become [4, 4, 4]:

    >>> phy2log = np.array([0, -1, 1, 0, 2, 1])
    >>> copies = copies_by_expert(phy2log, 3, 3, 3)
    >>> quota, load = np.array([8, 0, 4, 0, 0, 0]), np.array([8, 4, 0])
    >>> flow = Flow(quota, np.zeros(6, dtype=np.int64), load, np.ones(6, dtype=np.bool_))
    >>> level(flow, copies, copies, False, 0), flow.quota.tolist()
    (4, [4, 0, 0, 4, 0, 4])

Everything is a pure function of integers, so all ranks get the same result. The loops run without the GIL and are
written out, because numba takes twice as long to compile array expressions.

Shape suffixes: E experts, P slots, N slots that hold an expert, G devices.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from data.arrays import BoolArray, IntArray


class Copies(NamedTuple):
    """Groups of slots that tokens may move between: all slots of an expert, or its slots within a node.

    Attributes:
        slots: Slots sorted by group and number, `[N]`.
        device: Their devices, `[N]`; a table, because divisions took half of the time of a split.
        begin: Where each slot's group begins in `slots`, -1 for an empty slot, `[P]`.
        end: Where it ends, `[P]`.
    """

    slots: IntArray
    device: IntArray
    begin: IntArray
    end: IntArray


class Flow(NamedTuple):
    """A split that is changed in place.

    Attributes:
        quota: Tokens in each slot, `[P]`.
        own: Tokens of the slot's expert that come from the slot's device, `[P]`; the last to be moved.
        load: Time of each device in units of one token, `[G]`.
        active: Whether a slot may get tokens, `[P]`.
    """

    quota: IntArray
    own: IntArray
    load: IntArray
    active: BoolArray


@njit(cache=True, nogil=True)
def copies_by_expert(phy2log: IntArray, num_experts: int, num_devices: int, devices_per_node: int) -> Copies:
    """Groups of slots by expert and node.

    For phy2log [0, 1, -1, 2, 3, 0] on one node the slots are [0, 5, 1, 3, 4]: expert 0 is in slots 0 and 5.

    Raises:
        ValueError: If an expert has no slot.
    """
    first = np.zeros(num_experts + 1, dtype=np.int64)
    for expert in phy2log:
        if expert >= 0:
            first[expert + 1] += 1
    for expert in range(num_experts):
        if first[expert + 1] == 0:
            raise ValueError("expert " + str(expert) + " has no slot; every expert needs at least one")
        first[expert + 1] += first[expert]
    slots, fill = np.empty(first[-1], dtype=np.int64), first[:-1].copy()
    for slot, expert in enumerate(phy2log):
        if expert >= 0:
            slots[fill[expert]] = slot
            fill[expert] += 1
    begin, end = np.full(phy2log.size, -1, dtype=np.int64), np.full(phy2log.size, -1, dtype=np.int64)
    slots_per_node, start = phy2log.size // num_devices * devices_per_node, 0
    for i in range(1, slots.size + 1):
        same = i < slots.size and phy2log[slots[i]] == phy2log[slots[start]]
        if not same or slots[i] // slots_per_node != slots[start] // slots_per_node:
            for j in range(start, i):
                begin[slots[j]], end[slots[j]] = start, i
            start = i
    return Copies(slots, slots // (phy2log.size // num_devices), begin, end)


@njit(cache=True, nogil=True)
def level(flow: Flow, copies: Copies, near: Copies, nodes: bool, bound: int) -> int:
    """Makes the largest device time as small as whole tokens allow, in place, and returns it.

    Args:
        flow: The split to begin with.
        copies: Groups by expert.
        near: Groups by expert and node.
        nodes: Whether chains within nodes go first. Then come chains that take no token from its own device, then all.
        bound: A device time that no split can beat, 0 if none but the mean is known.
    """
    nothing, seen_N = np.zeros_like(flow.own), np.empty(copies.slots.size, dtype=np.bool_)
    some_own = flow.own.any()
    target = max(bound, -(-flow.load.sum() // flow.load.size))  # no split has a smaller maximum
    while True:
        if nodes:
            shed(flow, near, target, flow.own)
        if some_own:
            shed(flow, copies, target, flow.own)
        shed(flow, copies, target, nothing)
        heavy = int(np.argmax(flow.load))
        if flow.load[heavy] <= target:
            return int(flow.load[heavy])
        # No reached device can give tokens to a device outside, each holds at least the target, the heavy one more.
        target = mean_reached(flow, copies, heavy, seen_N)


@njit(cache=True, nogil=True)
def shed(flow: Flow, copies: Copies, target: int, kept_P: IntArray) -> None:
    """Moves tokens from devices above the target to devices below it, in place, until no chain is left.

    Args:
        flow: The split.
        copies: Groups of slots that tokens may move between.
        target: Device time that chains bring their ends to.
        kept_P: Tokens that stay in their slot.
    """
    num_devices = flow.load.size
    slots_per_device = flow.quota.size // num_devices
    depth_G, depth_N = np.empty(num_devices, dtype=np.int64), np.empty(copies.slots.size, dtype=np.int64)
    queue, next_slot_G = np.empty(num_devices, dtype=np.int64), np.empty(num_devices, dtype=np.int64)
    next_copy_N = np.empty(copies.slots.size, dtype=np.int64)
    chain = np.empty((num_devices, 2), dtype=np.int64)
    while _find_depths(flow, copies, target, kept_P, depth_G, depth_N, queue):
        for device in range(num_devices):
            next_slot_G[device] = device * slots_per_device
        for i in range(next_copy_N.size):
            next_copy_N[i] = i
        for heavy in range(num_devices):
            while depth_G[heavy] == 0 and flow.load[heavy] > target:
                links = _find_chain(
                    heavy, flow, copies, target, kept_P, depth_G, depth_N, next_slot_G, next_copy_N, chain
                )
                if links == 0:
                    break
                _move(flow, chain, links, target, kept_P)


@njit(cache=True, nogil=True)
def _find_depths(
    flow: Flow, copies: Copies, target: int, kept_P: IntArray, depth_G: IntArray, depth_N: IntArray, queue: IntArray
) -> bool:
    """Length of the shortest chain from a device above the target to each device and group; whether one ends below it.

    Depths are -1 where no chain leads, and beyond the nearest device below the target.
    """
    quota_P, load_G, active_P = flow.quota, flow.load, flow.active
    slots_N, device_N, begin_P, end_P = copies
    slots_per_device = quota_P.size // load_G.size
    head, tail, last = 0, 0, load_G.size
    depth_N[:] = -1
    for device in range(load_G.size):
        depth_G[device] = -1
        if load_G[device] > target:
            depth_G[device] = 0
            queue[tail] = device
            tail += 1
    found = False
    while head < tail and depth_G[queue[head]] < last:
        device = queue[head]
        head += 1
        for leave in range(device * slots_per_device, (device + 1) * slots_per_device):
            group = begin_P[leave]
            if group < 0 or quota_P[leave] <= kept_P[leave] or depth_N[group] >= 0:
                continue
            depth_N[group] = depth_G[device]
            for i in range(group, end_P[leave]):
                other = device_N[i]
                if depth_G[other] >= 0 or not active_P[slots_N[i]]:
                    continue
                depth_G[other] = depth_G[device] + 1
                queue[tail] = other
                tail += 1
                if load_G[other] < target:
                    found, last = True, depth_G[other]
    return found


@njit(cache=True, nogil=True)
def _find_chain(
    heavy: int,
    flow: Flow,
    copies: Copies,
    target: int,
    kept_P: IntArray,
    depth_G: IntArray,
    depth_N: IntArray,
    next_slot_G: IntArray,
    next_copy_N: IntArray,
    chain: IntArray,
) -> int:
    """Finds a shortest chain from a heavy device to one below the target, depth first; returns its links, or 0.

    Slots and copies before `next_slot_G` and `next_copy_N` lead nowhere in this phase. In `level`'s example the chain
    from device 0 is [[0, 3], [2, 5]]: the slot that tokens leave and the slot that they enter, for each link.
    """
    quota_P, load_G, active_P = flow.quota, flow.load, flow.active
    slots_N, device_N, begin_P, end_P = copies
    slots_per_device = quota_P.size // load_G.size
    device, links = heavy, 0
    while True:
        if load_G[device] < target:
            return links
        other = -1
        while next_slot_G[device] < (device + 1) * slots_per_device:
            leave = next_slot_G[device]
            group = begin_P[leave]
            if group >= 0 and quota_P[leave] > kept_P[leave] and depth_N[group] == depth_G[device]:
                while next_copy_N[group] < end_P[leave]:
                    enter, there = slots_N[next_copy_N[group]], device_N[next_copy_N[group]]
                    if depth_G[there] == depth_G[device] + 1 and active_P[enter]:
                        chain[links, 0], chain[links, 1] = leave, enter
                        other = there
                        break
                    next_copy_N[group] += 1
            if other >= 0:
                break
            next_slot_G[device] += 1
        if other >= 0:
            device = other
            links += 1
        elif links == 0:
            return 0
        else:
            depth_G[device] = -1  # no chain of this phase goes on from here
            links -= 1
            device = chain[links, 0] // slots_per_device


@njit(cache=True, nogil=True)
def _move(flow: Flow, chain: IntArray, links: int, target: int, kept_P: IntArray) -> None:
    """Moves as many tokens along a chain as every link carries, until one of its ends is at the target, in place.

    Devices in the middle give as many tokens as they take, so only the loads of the two ends change.
    """
    quota_P, load_G = flow.quota, flow.load
    slots_per_device = quota_P.size // load_G.size
    heavy, light = chain[0, 0] // slots_per_device, chain[links - 1, 1] // slots_per_device
    tokens = min(load_G[heavy] - target, target - load_G[light])
    for i in range(links):
        tokens = min(tokens, quota_P[chain[i, 0]] - kept_P[chain[i, 0]])
    for i in range(links):
        quota_P[chain[i, 0]] -= tokens
        quota_P[chain[i, 1]] += tokens
    load_G[heavy] -= tokens
    load_G[light] += tokens


@njit(cache=True, nogil=True)
def mean_reached(flow: Flow, copies: Copies, heavy: int, seen_N: BoolArray) -> int:
    """Mean time, rounded up, of the devices that chains from a heavy device reach, itself included.

    All copies of the groups that have tokens on these devices lie on them; such groups are marked in `seen_N`.
    """
    quota_P, load_G, active_P = flow.quota, flow.load, flow.active
    slots_N, device_N, begin_P, end_P = copies
    slots_per_device = quota_P.size // load_G.size
    reached_G = np.zeros(load_G.size, dtype=np.bool_)
    seen_N[:] = False
    queue = np.empty(load_G.size, dtype=np.int64)
    queue[0], head, tail, total = heavy, 0, 1, load_G[heavy]
    reached_G[heavy] = True
    while head < tail:
        device = queue[head]
        head += 1
        for leave in range(device * slots_per_device, (device + 1) * slots_per_device):
            group = begin_P[leave]
            if group < 0 or quota_P[leave] <= 0 or seen_N[group]:
                continue
            seen_N[group] = True
            for i in range(group, end_P[leave]):
                other = device_N[i]
                if active_P[slots_N[i]] and not reached_G[other]:
                    reached_G[other] = True
                    total += load_G[other]
                    queue[tail] = other
                    tail += 1
    return int(-(-total // tail))
