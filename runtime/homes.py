"""Where each expert lives for good: chosen once, before the first batch.

Shape suffixes: L MoE layers, E logical experts, G devices.
"""

import numpy as np
import numpy.typing as npt

from runtime.plan import IntArray, check_division


def contiguous_homes(num_layers: int, num_experts: int) -> IntArray:
    """Experts in their own order, as a model without balancing lays them out, `[L, E]`."""
    return np.tile(np.arange(num_experts), (num_layers, 1))


def flat_homes(load: npt.NDArray[np.float64], num_devices: int) -> IntArray:
    """Homes that give every device E / G experts and about the same load.

    Longest processing time first: experts from the most to the least loaded, each to the least loaded device that
    still has a home slot free (Graham 1969).

    Args:
        load: Load or share known so far, `[L, E]`.
        num_devices: G.

    Returns:
        Experts in the order of the home slots, device after device, `[L, E]`; within a device in their own order.
    """
    num_layers, num_experts = load.shape
    check_division(num_experts, num_devices, 0)
    return np.stack([_pack(row, num_devices, num_experts // num_devices) for row in load]).reshape(num_layers, -1)


def _pack(load: npt.NDArray[np.float64], num_devices: int, room: int) -> IntArray:
    """Packs one layer's experts `[E]` into devices, `[G, room]`."""
    devices: list[list[int]] = [[] for _ in range(num_devices)]
    weight = np.zeros(num_devices)
    for expert in np.argsort(-load, kind="stable").tolist():
        device = min((g for g in range(num_devices) if len(devices[g]) < room), key=lambda g: (weight[g], g))
        devices[device].append(expert)
        weight[device] += load[expert]
    return np.array([sorted(experts) for experts in devices])
