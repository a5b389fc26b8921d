"""Whose tokens go to which slot: compiled kernels that deal the tokens of source devices to an expert's slots.

Written out in loops for numba, as in `runtime.flow`. Shape suffixes: S source devices, E experts, P slots.
"""

import numpy as np
from numba import njit

from runtime.plan import IntArray


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
