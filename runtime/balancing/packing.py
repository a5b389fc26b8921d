"""Compiled packing of experts onto devices: homes chosen from a known load.

`runtime.balancing.plan.flat_homes` is the interface. Items are packed from the heaviest to the lightest, each onto the
least loaded device that still has a free slot (longest processing time first, Graham 1969).

    >>> pack_equally(np.array([[8.0, 7, 1, 2]]), 2).tolist()
    [[0, 2, 1, 3]]

Three devices with two slots each, and one hot expert: it is copied twice. Its home is slot 0, where the copies were
packed as {0, 2}, {0, 3} and {0, 1}; the slots of the other two copies are replica slots:

    >>> pack_with_replicas(np.array([[9.0, 1, 2, 2]]), 3, 2).tolist()
    [[0, 2, 3, -1, 1, -1]]

Shape suffixes: L MoE layers, E logical experts, P slots, G devices, N items to pack.
"""

import numpy as np
from numba import njit

from data.arrays import FloatArray, IntArray


@njit(cache=True, nogil=True)
def pack_equally(load_LE: FloatArray, num_devices: int) -> IntArray:
    """Experts in the order of the home slots, device after device, E / G on each, in their own order, `[L, E]`."""
    num_layers, num_experts = load_LE.shape
    homes = np.empty((num_layers, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        device = pack(load_LE[layer], num_devices, num_experts // num_devices)
        homes[layer] = np.argsort(device, kind="mergesort")
    return homes


@njit(cache=True, nogil=True)
def pack_with_replicas(load_LE: FloatArray, num_devices: int, num_redundant: int) -> IntArray:
    """The expert of each home slot, -1 in each replica slot, `[L, P]`; home slots come first on their device."""
    num_layers, num_experts = load_LE.shape
    num_slots = num_experts + num_redundant
    slots_per_device = num_slots // num_devices
    phy2log = np.full((num_layers, num_slots), -1, dtype=np.int64)
    for layer in range(num_layers):
        expert_N = replicate(load_LE[layer], num_slots)
        copies_E = np.bincount(expert_N, minlength=num_experts)
        device_N = pack((load_LE[layer] / copies_E)[expert_N], num_devices, slots_per_device)
        replicas_G = np.bincount(device_N[num_experts:], minlength=num_devices)
        home_E = device_N[:num_experts].copy()
        for item in range(num_experts, num_slots):  # spread the replica slots: the copy among most of them is the home
            expert, device = expert_N[item], device_N[item]
            if replicas_G[device] > replicas_G[home_E[expert]] + 1:
                replicas_G[device] -= 1
                replicas_G[home_E[expert]] += 1
                home_E[expert] = device
        used_G = np.zeros(num_devices, dtype=np.int64)
        for expert in range(num_experts):
            device = home_E[expert]
            phy2log[layer, device * slots_per_device + used_G[device]] = expert
            used_G[device] += 1
    return phy2log


@njit(cache=True, nogil=True)
def replicate(load_E: FloatArray, num_slots: int) -> IntArray:
    """Expert of each copy, `[P]`: each expert once, then the expert with most load per copy again and again.

    Loads [90, 48, 10, 10] with 6 slots: expert 0 is copied first, then expert 1, because 90 / 2 is less than 48.
    """
    copies = np.ones(load_E.size, dtype=np.int64)
    held = np.empty(num_slots, dtype=np.int64)
    held[: load_E.size] = np.arange(load_E.size)
    for i in range(load_E.size, num_slots):
        held[i] = np.argmax(load_E / copies)
        copies[held[i]] += 1
    return held


@njit(cache=True, nogil=True)
def pack(load_N: FloatArray, num_devices: int, slots_per_device: int) -> IntArray:
    """Device of each item, `[N]`. Loads [5, 3, 4, 1] on 2 devices: [0, 1, 1, 0]."""
    device_N = np.empty(load_N.size, dtype=np.int64)
    load_G, used_G = np.zeros(num_devices), np.zeros(num_devices, dtype=np.int64)
    for item in np.argsort(-load_N, kind="mergesort"):
        best = -1
        for device in range(num_devices):
            if used_G[device] < slots_per_device and (best < 0 or load_G[device] < load_G[best]):
                best = device
        device_N[item] = best
        load_G[best] += load_N[item]
        used_G[best] += 1
    return device_N
