"""Compiled integer kernels of the token split: quotas of least time, even quotas, and which source's tokens go where.

`runtime.balancing.split` is the interface, `runtime.balancing.leveling` the max-flow. Here is what comes before and
after it: a first split that keeps tokens on their own device, then on their own node, as far as the mean device time
allows, and gives the others to leaves first (runtime.balancing.peeling), and the sources of each slot's tokens. Where
an active slot has a price, runtime.balancing.active_slots chooses the slots.

Three devices with two slots each; expert 0 has copies on devices 0 and 1, expert 1 on devices 1 and 2:

    >>> phy2log = np.array([0, -1, 1, 0, 2, 1])
    >>> least_time_quotas(np.array([[8, 4, 0]]), np.array([8, 4, 0]), phy2log, 3, 0, 3).tolist()
    [[4, 0, 0, 4, 0, 4]]

With an overhead of 10 tokens for each active slot, a copy that would save 3 tokens stays without any:

    >>> phy2log, counts = np.array([0, 1, 0, 2]), np.array([[100, 0, 94]])
    >>> least_time_quotas(counts, counts[0], phy2log, 2, 0, 2).tolist()
    [[97, 0, 3, 94]]
    >>> least_time_quotas(counts, counts[0], phy2log, 2, 10, 2).tolist()
    [[100, 0, 0, 94]]

numba compiles these loops once and caches them; they run without the GIL.

Shape suffixes: S source devices, E experts, P slots, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import IntArray
from runtime.balancing.active_slots import few_slots, slots_with_and_without_copies
from runtime.balancing.leveling import Copies, Flow, copies_by_expert, level, mean_reached
from runtime.balancing.peeling import peel


@njit(cache=True, nogil=True)
def even_quotas(counts_SE: IntArray, phy2log: IntArray) -> IntArray:
    """Even quotas `[S, P]`.

    Which slots take the odd tokens shifts with the source: 3 tokens from each of two sources over two slots are 2 + 1
    from source 0 and 1 + 2 from source 1, so that both slots get 3.
    """
    num_sources, num_experts = counts_SE.shape
    copies = copies_by_expert(phy2log, num_experts, 1, 1)
    quota = np.zeros((num_sources, phy2log.size), dtype=np.int64)
    for source in range(num_sources):
        for slot in copies.slots:
            first, stop = copies.begin[slot], copies.end[slot]
            if copies.slots[first] != slot:
                continue
            each, odd = divmod(counts_SE[source, phy2log[slot]], stop - first)
            for k in range(stop - first):
                quota[source, copies.slots[first + k]] = each + (1 if (k + source) % (stop - first) < odd else 0)
    return quota


@njit(cache=True, nogil=True)
def least_time_quotas(
    counts_SE: IntArray,
    total_E: IntArray,
    phy2log: IntArray,
    num_devices: int,
    expert_overhead_tokens: int,
    devices_per_node: int,
) -> IntArray:
    """Quotas `[S, P]` whose slowest device takes the least time; `runtime.balancing.split.split_by_quota` explains it.

    With an overhead, the split over all slots competes with one that makes slots active one by one, because an exact
    choice of slots would be a mixed-integer program.
    """
    copies = copies_by_expert(phy2log, total_E.size, num_devices, num_devices)
    near = copies
    if devices_per_node < num_devices:
        near = copies_by_expert(phy2log, total_E.size, num_devices, devices_per_node)
    own_P = _own_tokens(counts_SE, phy2log, num_devices)
    flow = least_time(
        counts_SE, total_E, own_P, phy2log, copies, near, expert_overhead_tokens, num_devices, devices_per_node
    )
    return _assign_sources(counts_SE, flow.quota, own_P, phy2log, copies, num_devices, devices_per_node)


@njit(cache=True, nogil=True)
def least_time(
    counts_SE: IntArray,
    total_E: IntArray,
    own_P: IntArray,
    phy2log: IntArray,
    copies: Copies,
    near: Copies,
    expert_overhead_tokens: int,
    num_devices: int,
    devices_per_node: int,
) -> Flow:
    """The split of least time before its tokens have sources; `near` groups slots by expert and node."""
    flow = Flow(
        np.zeros_like(own_P), own_P, np.zeros(num_devices, dtype=np.int64), np.ones(phy2log.size, dtype=np.bool_)
    )
    for slot, expert in enumerate(phy2log):
        if expert >= 0 and total_E[expert] > 0:
            flow.load[slot // (phy2log.size // num_devices)] += expert_overhead_tokens
    nodes = devices_per_node < num_devices
    left_E, target = _keep_near(flow, counts_SE, total_E, phy2log, copies, near, devices_per_node)
    slowest = level(flow, copies, near, nodes, _share_out(flow, copies, left_E, phy2log, target))
    if expert_overhead_tokens > 0:
        few = few_slots(total_E, own_P, phy2log, copies, num_devices, expert_overhead_tokens)
        if level(few, copies, near, nodes, 0) <= slowest:
            flow = few
    return flow


@njit(cache=True, nogil=True)
def _keep_near(
    flow: Flow,
    counts_SE: IntArray,
    total_E: IntArray,
    phy2log: IntArray,
    copies: Copies,
    near: Copies,
    devices_per_node: int,
) -> tuple[IntArray, int]:
    """Splits tokens that have no choice, are on a device of their expert, or on a node with room for them, in place.

    Returns:
        The tokens left, `[E]`, and the mean device time, rounded up.
    """
    quota_P, own_P, load_G = flow.quota, flow.own, flow.load
    slots_N, device_N, begin_P, end_P = copies
    left_E = total_E.copy()
    for i, slot in enumerate(slots_N):  # tokens whose own device holds their expert stay there
        alone, expert = end_P[slot] - begin_P[slot] == 1, phy2log[slot]
        quota_P[slot] = total_E[expert] if alone else own_P[slot]
        load_G[device_N[i]] += quota_P[slot]
        left_E[expert] -= quota_P[slot]
    target = -(-(load_G.sum() + left_E.sum()) // load_G.size)
    slots_per_device = quota_P.size // load_G.size
    if devices_per_node < load_G.size and counts_SE.shape[0] > 1:
        for group in near.slots:
            if near.slots[near.begin[group]] != group or left_E[phy2log[group]] == 0:
                continue
            expert, node = phy2log[group], group // slots_per_device // devices_per_node
            tokens = 0
            for source in range(node * devices_per_node, (node + 1) * devices_per_node):
                tokens += counts_SE[source, expert]
            for i in range(near.begin[group], near.end[group]):
                tokens -= quota_P[near.slots[i]]
            left_E[expert] -= _pour(flow, near, group, tokens, target)
    return left_E, target


@njit(cache=True, nogil=True)
def _share_out(flow: Flow, copies: Copies, left_E: IntArray, phy2log: IntArray, target: int) -> int:
    """Splits the tokens left, in place, and again among devices that cannot reach the target; returns the last target.

    Such devices get the mean of those that their tokens reach, which no split can beat. The other devices keep their
    tokens, so that they stay as level as the first target makes them.
    """
    near_P, part_E = flow.quota.copy(), np.zeros_like(left_E)
    seen_N = np.empty(copies.slots.size, dtype=np.bool_)
    peel(flow, copies, left_E, phy2log, target)
    while True:
        heavy = int(np.argmax(flow.load))
        if flow.load[heavy] <= target:
            return target
        bound = mean_reached(flow, copies, heavy, seen_N)
        if bound <= target:
            return target
        target = bound
        part_E[:] = 0
        quota_P, load_G, slots_N, device_N, begin_P = flow.quota, flow.load, copies.slots, copies.device, copies.begin
        for i, slot in enumerate(slots_N):
            if seen_N[begin_P[slot]]:
                load_G[device_N[i]] -= quota_P[slot] - near_P[slot]
                quota_P[slot] = near_P[slot]
                part_E[phy2log[slot]] = left_E[phy2log[slot]]
        peel(flow, copies, part_E, phy2log, target)


@njit(cache=True, nogil=True)
def _pour(flow: Flow, copies: Copies, slot: int, tokens: int, target: int) -> int:
    """Gives tokens to a slot's group, in place: to each device up to the target, the rest to the least loaded."""
    slots_per_device, left, least = flow.quota.size // flow.load.size, tokens, slot
    for i in range(copies.begin[slot], copies.end[slot]):
        enter = copies.slots[i]
        part = min(left, max(target - flow.load[enter // slots_per_device], 0))
        flow.quota[enter] += part
        flow.load[enter // slots_per_device] += part
        left -= part
        if flow.load[enter // slots_per_device] < flow.load[least // slots_per_device]:
            least = enter
    flow.quota[least] += left
    flow.load[least // slots_per_device] += left
    return tokens


@njit(cache=True, nogil=True)
def _assign_sources(
    counts_SE: IntArray,
    quota_P: IntArray,
    own_P: IntArray,
    phy2log: IntArray,
    copies: Copies,
    num_devices: int,
    devices_per_node: int,
) -> IntArray:
    """Fills the slots' quotas with each source's tokens, `[S, P]`: own device first, then own node, then in order.

    Sources are visited in order and each fills slots in order, so the first slot of an expert gets the first sources.
    """
    num_sources, slots_per_device = counts_SE.shape[0], quota_P.size // num_devices
    assigned = np.zeros((num_sources, quota_P.size), dtype=np.int64)
    if num_sources == 1:
        assigned[0] = quota_P
        return assigned
    free_P, left_E = quota_P.copy(), np.empty(counts_SE.shape[1], dtype=np.int64)
    for slot in range(quota_P.size):
        tokens = assigned[slot // slots_per_device, slot] = min(own_P[slot], quota_P[slot])
        free_P[slot] -= tokens
    node_slots = slots_per_device * devices_per_node
    if devices_per_node < num_devices:
        for source in range(num_sources):
            begin = source // devices_per_node * node_slots
            _left_over(left_E, counts_SE[source], assigned[source], phy2log, begin, begin + node_slots)
            for slot in range(begin, begin + node_slots):
                if phy2log[slot] >= 0:
                    tokens = min(left_E[phy2log[slot]], free_P[slot])
                    assigned[source, slot] += tokens
                    left_E[phy2log[slot]] -= tokens
                    free_P[slot] -= tokens
    if devices_per_node == num_devices:  # so far a source's tokens are on its own device alone
        node_slots, devices_per_node = slots_per_device, 1
    only, firsts = slots_with_and_without_copies(copies)
    next_slot = copies.begin[firsts]
    for source in range(num_sources):
        for slot in only:
            assigned[source, slot] = counts_SE[source, phy2log[slot]]
        begin = source // devices_per_node * node_slots
        _left_over(left_E, counts_SE[source], assigned[source], phy2log, begin, begin + node_slots)
        for i in range(firsts.size):
            left = left_E[phy2log[firsts[i]]]
            while left > 0:
                slot = copies.slots[next_slot[i]]
                tokens = min(left, free_P[slot])
                assigned[source, slot] += tokens
                left -= tokens
                free_P[slot] -= tokens
                if free_P[slot] == 0:
                    next_slot[i] += 1
    return assigned


@njit(cache=True, nogil=True)
def _left_over(
    left_E: IntArray, counts_E: IntArray, assigned_P: IntArray, phy2log: IntArray, begin: int, end: int
) -> None:
    """Tokens of a source that the slots from begin to end do not have, written to the first argument."""
    left_E[:] = counts_E
    for slot in range(begin, end):
        if phy2log[slot] >= 0:
            left_E[phy2log[slot]] -= assigned_P[slot]


@njit(cache=True, nogil=True)
def _own_tokens(counts_SE: IntArray, phy2log: IntArray, num_devices: int) -> IntArray:
    """Tokens already on the device of each slot, `[P]`; a second copy of an expert on a device counts none."""
    slots_per_device = phy2log.size // num_devices
    own_P = np.zeros(phy2log.size, dtype=np.int64)
    if counts_SE.shape[0] == 1:
        return own_P
    for slot, expert in enumerate(phy2log):
        counted = expert < 0
        for other in range(slot // slots_per_device * slots_per_device, slot):
            counted = counted or phy2log[other] == expert
        if not counted:
            own_P[slot] = counts_SE[slot // slots_per_device, expert]
    return own_P
