"""Compiled integer kernels of the token split: max-flow quotas, even quotas, and which source's tokens take which slot.

`runtime.balancing.split` is the interface. An expert's tokens can be computed on any device that holds a copy. Starting
from a split in which every token stays where it is, the most loaded device sheds tokens along chains of copies (expert
a from device 0 to 3, expert b from 3 to 5, ...) to a device below the mean, until no chain leads from it to a device
with at least two tokens less. No split is then better, because the devices that the chains reach hold only tokens that
no other device can take. Chains are searched breadth first (shortest augmenting paths, Edmonds and Karp 1972); chains
that take no token away from its own device are tried first.

Three devices with two slots each; expert 0 has copies on devices 0 and 1, expert 1 on devices 1 and 2. The loads start
as [8, 4, 0], the mean is 4. Device 0 can give tokens of expert 0 only to device 1, which is at the mean already; device
1 can pass on tokens of expert 1 to device 2. So 4 tokens of expert 0 move from device 0 to 1 and, in the same step, 4
tokens of expert 1 from device 1 to 2; the loads become [4, 4, 4]:

    >>> phy2log = np.array([0, -1, 1, 0, 2, 1])
    >>> least_time_quotas(np.array([[8, 4, 0]]), np.array([8, 4, 0]), phy2log, 3, 0, 3).tolist()
    [[4, 0, 0, 4, 0, 4]]

numba compiles these loops once and caches them; they run without the GIL. They are written as plain loops because numba
takes twice as long to compile array expressions.

Shape suffixes: S source devices, E experts, P slots, G devices.
"""

import numpy as np
from numba import njit

from data.arrays import BoolArray, IntArray


@njit(cache=True, nogil=True)
def even_quotas(counts_SE: IntArray, phy2log: IntArray) -> IntArray:
    """Even quotas `[S, P]`.

    Which slots take the odd tokens shifts with the source: 3 tokens from each of two sources over two slots are 2 + 1
    from source 0 and 1 + 2 from source 1, so that both slots get 3.
    """
    num_sources, num_experts = counts_SE.shape
    first, slots = _slots_by_expert(phy2log, num_experts)
    quota = np.zeros((num_sources, phy2log.size), dtype=np.int64)
    for source in range(num_sources):
        for expert in range(num_experts):
            copies = first[expert + 1] - first[expert]
            each, odd = divmod(counts_SE[source, expert], copies)
            for k in range(copies):
                quota[source, slots[first[expert] + k]] = each + (1 if (k + source) % copies < odd else 0)
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

    With an overhead, slots are switched off one by one, those with fewest tokens first, as long as the slowest device
    does not get slower: an exact choice of slots would be a mixed-integer program.
    """
    first, slots = _slots_by_expert(phy2log, counts_SE.shape[1])
    local_P = _local_tokens(counts_SE, phy2log, num_devices)
    settled_P = np.zeros(phy2log.size, dtype=np.bool_)  # slots that have been tried
    active_P = np.ones(phy2log.size, dtype=np.bool_)
    quota_P, slowest = _balance(total_E, local_P, phy2log, first, slots, active_P, num_devices, expert_overhead_tokens)
    while expert_overhead_tokens > 0:
        # a slot with more tokens than its overhead saves more than it costs
        slot = _lightest(quota_P, settled_P, expert_overhead_tokens, phy2log, first)
        if slot < 0:
            break
        settled_P[slot] = True
        if _active_copies(phy2log[slot], first, slots, active_P) > 1:
            active_P[slot] = False
            trial_P, trial = _balance(
                total_E, local_P, phy2log, first, slots, active_P, num_devices, expert_overhead_tokens
            )
            if trial <= slowest:
                quota_P, slowest = trial_P, trial
            else:
                active_P[slot] = True
    return _assign_sources(counts_SE, quota_P, first, slots, num_devices, devices_per_node)


@njit(cache=True, nogil=True)
def _balance(
    total_E: IntArray,
    local_P: IntArray,
    phy2log: IntArray,
    first: IntArray,
    slots: IntArray,
    active_P: BoolArray,
    num_devices: int,
    expert_overhead_tokens: int,
) -> tuple[IntArray, int]:
    """Tokens per slot `[P]` that make the greatest device time as small as whole tokens allow, and that time."""
    slots_per_device = phy2log.size // num_devices
    quota_P = np.zeros(phy2log.size, dtype=np.int64)
    load_G = np.zeros(num_devices, dtype=np.int64)
    for slot in range(phy2log.size):  # tokens whose own device holds their expert stay there
        if active_P[slot] and phy2log[slot] >= 0:
            quota_P[slot] = local_P[slot]
            overhead = expert_overhead_tokens if total_E[phy2log[slot]] > 0 else 0
            load_G[slot // slots_per_device] += local_P[slot] + overhead
    for expert in range(total_E.size):  # the expert's other tokens go to the least loaded device that holds it
        rest, best = total_E[expert], -1
        for i in range(first[expert], first[expert + 1]):
            slot = slots[i]
            rest -= quota_P[slot]
            if active_P[slot] and (best < 0 or load_G[slot // slots_per_device] < load_G[best // slots_per_device]):
                best = slot
        quota_P[best] += rest
        load_G[best // slots_per_device] += rest
    nothing, everywhere = np.zeros(local_P.size, dtype=np.int64), np.ones(num_devices, dtype=np.bool_)
    floor = _mean_load(load_G, everywhere)  # a lower bound: no split has a smaller maximum
    while True:
        heavy = int(np.argmax(load_G))
        if load_G[heavy] <= floor:
            return quota_P, load_G[heavy]
        kept_P = local_P  # first without sending any token away from its own device
        light, via, reached_G = _find_chain(heavy, floor, quota_P, kept_P, load_G, phy2log, first, slots, active_P)
        if light < 0:
            kept_P = nothing
            light, via, reached_G = _find_chain(heavy, floor, quota_P, kept_P, load_G, phy2log, first, slots, active_P)
        if light < 0:
            # No reached device can give tokens to a device outside. Their mean is then a lower bound too, and a higher
            # one, since each of them holds at least `floor` and the heavy one more.
            floor = _mean_load(load_G, reached_G)
        else:
            _shed(heavy, light, floor, via, quota_P, kept_P, load_G)


@njit(cache=True, nogil=True)
def _find_chain(
    heavy: int,
    floor: int,
    quota_P: IntArray,
    kept_P: IntArray,
    load_G: IntArray,
    phy2log: IntArray,
    first: IntArray,
    slots: IntArray,
    active_P: BoolArray,
) -> tuple[int, IntArray, BoolArray]:
    """Looks for the nearest device below the floor that the heavy device can shed tokens to, breadth first.

    Returns:
        The device, or -1; for each device reached, the slot its tokens leave and the slot they enter, `[G, 2]`; the
        devices reached, `[G]`. In the module's example: device 2; via[1] = (0, 3), via[2] = (2, 5).
    """
    num_devices = load_G.size
    slots_per_device = phy2log.size // num_devices
    via = np.empty((num_devices, 2), dtype=np.int64)
    reached = np.zeros(num_devices, dtype=np.bool_)
    queue = np.empty(num_devices, dtype=np.int64)
    queue[0], head, tail = heavy, 0, 1
    reached[heavy] = True
    while head < tail:
        device = queue[head]
        head += 1
        for leave in range(device * slots_per_device, (device + 1) * slots_per_device):
            expert = phy2log[leave]
            if expert < 0 or quota_P[leave] <= kept_P[leave]:
                continue
            for i in range(first[expert], first[expert + 1]):
                enter = slots[i]
                other = enter // slots_per_device
                if reached[other] or not active_P[enter]:
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
    """Moves as many tokens along the chain as every link carries, until one of its ends is at the floor, in place.

    The chain is followed backwards, from the light device to the heavy one. Devices in the middle give as many tokens
    as they take, so only the loads of the two ends change.
    """
    slots_per_device = quota_P.size // load_G.size
    tokens = min(load_G[heavy] - floor, floor - load_G[light])
    device = light
    while device != heavy:
        leave = via[device, 0]
        tokens = min(tokens, quota_P[leave] - kept_P[leave])
        device = leave // slots_per_device
    device = light
    while device != heavy:
        leave, enter = via[device, 0], via[device, 1]
        quota_P[leave] -= tokens
        quota_P[enter] += tokens
        device = leave // slots_per_device
    load_G[heavy] -= tokens
    load_G[light] += tokens


@njit(cache=True, nogil=True)
def _assign_sources(
    counts_SE: IntArray, quota_P: IntArray, first: IntArray, slots: IntArray, num_devices: int, devices_per_node: int
) -> IntArray:
    """Fills the slots' quotas with each source's tokens, `[S, P]`: own device first, then own node, then in order.

    `source // reach == device // reach` is true on the same device for a reach of 1, in the same node for a reach of
    `devices_per_node`, and always for a reach of `num_devices`.
    """
    num_sources = counts_SE.shape[0]
    slots_per_device = quota_P.size // num_devices
    assigned = np.zeros((num_sources, quota_P.size), dtype=np.int64)
    free_P = quota_P.copy()
    for expert in range(counts_SE.shape[1]):
        begin, end = first[expert], first[expert + 1]
        left_S = np.empty(num_sources, dtype=np.int64)
        for source in range(num_sources):
            left_S[source] = counts_SE[source, expert]
        for reach in (1, devices_per_node, num_devices):
            for slot in slots[begin:end]:
                for source in range(num_sources):
                    near = source // reach == slot // slots_per_device // reach
                    if num_sources == 1 or end - begin == 1 or near:
                        tokens = min(left_S[source], free_P[slot])
                        assigned[source, slot] += tokens
                        left_S[source] -= tokens
                        free_P[slot] -= tokens
            if end - begin == 1:  # a single slot took all tokens in the first round
                break
    return assigned


@njit(cache=True, nogil=True)
def _slots_by_expert(phy2log: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """Where each expert's slots begin, `[E + 1]`, and all slots sorted by expert.

    For phy2log [0, 1, -1, 2, 3, 0]: [0, 2, 3, 4, 5] and [0, 5, 1, 3, 4]; expert 0 is in slots 0 and 5.

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
    slots = np.empty(first[-1], dtype=np.int64)
    fill = first[:-1].copy()
    for slot, expert in enumerate(phy2log):
        if expert >= 0:
            slots[fill[expert]] = slot
            fill[expert] += 1
    return first, slots


@njit(cache=True, nogil=True)
def _local_tokens(counts_SE: IntArray, phy2log: IntArray, num_devices: int) -> IntArray:
    """Tokens already on the device of each slot, `[P]`; a second copy of an expert on a device counts none."""
    slots_per_device = phy2log.size // num_devices
    local_P = np.zeros(phy2log.size, dtype=np.int64)
    if counts_SE.shape[0] == 1:
        return local_P
    for slot, expert in enumerate(phy2log):
        counted = expert < 0
        for other in range(slot // slots_per_device * slots_per_device, slot):
            counted = counted or phy2log[other] == expert
        if not counted:
            local_P[slot] = counts_SE[slot // slots_per_device, expert]
    return local_P


@njit(cache=True, nogil=True)
def _lightest(quota_P: IntArray, settled_P: BoolArray, most: int, phy2log: IntArray, first: IntArray) -> int:
    """The slot with fewest tokens, at most `most`, among the unsettled slots of experts with several; or -1."""
    lightest = -1
    for slot, expert in enumerate(phy2log):
        if expert < 0 or settled_P[slot] or quota_P[slot] > most or first[expert + 1] - first[expert] < 2:
            continue
        if lightest < 0 or quota_P[slot] < quota_P[lightest]:
            lightest = slot
    return lightest


@njit(cache=True, nogil=True)
def _active_copies(expert: int, first: IntArray, slots: IntArray, active_P: BoolArray) -> int:
    """Slots of an expert that may get tokens."""
    copies = 0
    for i in range(first[expert], first[expert + 1]):
        copies += active_P[slots[i]]
    return copies


@njit(cache=True, nogil=True)
def _mean_load(load_G: IntArray, among_G: BoolArray) -> int:
    """Mean load of some devices, rounded up."""
    total, devices = 0, 0
    for device in range(load_G.size):
        if among_G[device]:
            total += load_G[device]
            devices += 1
    return -(-total // devices)
