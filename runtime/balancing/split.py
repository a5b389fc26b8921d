"""How many of an expert's tokens go to each of its slots, and how balanced the devices are under that split.

A layer is split once its router has chosen and the counts are exact. `split_by_quota` minimises the load of the most
loaded device and, among such splits, keeps tokens on their own device, then on their own node. `split_evenly` is what
most engines do. Both are pure functions of integers: every rank that holds the same counts and the same plan computes
the same quotas.

Expert 0 (10 tokens) has its home on device 0 and a copy on device 1:

    >>> phy2log = np.array([0, 1, -1, 2, 3, 0])
    >>> quotas = split_by_quota([10, 4, 2, 0], phy2log, num_devices=2)
    >>> quotas.tolist(), device_load(quotas, 2).tolist()
    ([[4, 4, 0, 2, 0, 6]], [8, 8])
    >>> device_load(split_evenly([10, 4, 2, 0], phy2log, num_devices=2), 2).tolist()
    [9, 7]

Shape suffixes: S source devices (1 where the source does not matter), L MoE layers, E logical experts, P slots,
G devices.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data.arrays import FloatArray, IntArray
from runtime.balancing.max_flow import even_quotas, least_time_quotas
from runtime.balancing.nodes import check_nodes
from runtime.balancing.plan import ReplicationPlan

MOST_TOKENS = 1 << 53
"""Most tokens of a layer, and most tokens that waking an expert costs: sums of such numbers fit into int64."""


def split_by_quota(
    counts: npt.ArrayLike,
    phy2log: IntArray,
    num_devices: int,
    *,
    expert_overhead_tokens: int = 0,
    devices_per_node: int | None = None,
) -> IntArray:
    """Splits a layer's tokens over the slots so that the load of the most loaded device is as small as possible.

    A device's time is `expert_overhead_tokens * active slots + tokens`, in units of one token. With
    `expert_overhead_tokens=0` the split is exactly optimal in whole tokens; otherwise copies that cost more than
    they save are left without tokens, one by one.

    Args:
        counts: Tokens on each source device whose router chose the expert, `[S, E]` or `[E]`; S is 1 or G.
        phy2log: Logical expert in each slot of this layer, -1 where empty, `[P]`.
        num_devices: G.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights.
        devices_per_node: Devices that share a fast network; None means one node.

    Returns:
        Quotas `[S, P]`; over an expert's slots they sum to its counts.

    Raises:
        ValueError: On counts that are negative, not whole, or not `[1 or G, E]`, or on an expert without a slot.
    """
    counts_SE = _checked(counts, phy2log, num_devices)
    if not 0 <= expert_overhead_tokens <= MOST_TOKENS:
        raise ValueError(f"expert_overhead_tokens is {expert_overhead_tokens}, expected 0 to {MOST_TOKENS}")
    check_nodes(num_devices, devices_per_node)
    node = devices_per_node or num_devices
    return least_time_quotas(counts_SE, counts_SE.sum(0), phy2log, num_devices, expert_overhead_tokens, node)


def split_evenly(counts: npt.ArrayLike, phy2log: IntArray, num_devices: int) -> IntArray:
    """Splits each expert's tokens evenly over its slots; the first slots get the odd tokens, shifted by source.

    Args:
        counts: As in `split_by_quota`.
        phy2log: As in `split_by_quota`.
        num_devices: G.

    Returns:
        Quotas `[S, P]`.
    """
    return even_quotas(_checked(counts, phy2log, num_devices), phy2log)


def device_load(quotas: IntArray, num_devices: int) -> IntArray:
    """Tokens each device computes under quotas `[S, P]`: int64 `[G]`."""
    return np.asarray(quotas.sum(0).reshape(num_devices, -1).sum(1))


def split_load(load_LE: IntArray, plan: ReplicationPlan) -> IntArray:
    """Tokens each device would compute if a batch with this load ran under a plan, `[L, G]`."""
    return np.stack(
        [
            device_load(split_by_quota(load, phy2log, plan.num_devices), plan.num_devices)
            for load, phy2log in zip(load_LE, plan.phy2log, strict=True)
        ]
    )


def balancedness(device_load_LG: IntArray) -> FloatArray:
    """Mean device load over the largest one, for each layer, `[L]`; 1 is perfect, NaN a layer without tokens.

    >>> balancedness(np.array([[8, 8], [12, 4], [0, 0]])).round(3).tolist()
    [1.0, 0.667, nan]
    """
    largest = device_load_LG.max(-1)
    mean = device_load_LG.mean(-1)
    result: FloatArray = np.divide(mean, largest, out=np.full_like(mean, np.nan), where=largest > 0)
    return result


def mean_balancedness(device_load_LG: IntArray) -> float:
    """Mean of `balancedness` over the layers that have tokens; NaN where none has.

    >>> round(mean_balancedness(np.array([[8, 8], [12, 4], [0, 0]])), 3)
    0.833
    """
    balance = balancedness(device_load_LG)
    known = balance[np.isfinite(balance)]
    return float(known.mean()) if known.size else float("nan")


def check_total(counts: npt.NDArray[Any]) -> None:
    """Refuses counts that add up to more than `MOST_TOKENS`.

    Raises:
        ValueError: Naming the sum.
    """
    if (total := counts.sum(dtype=np.float64)) > MOST_TOKENS:
        raise ValueError(f"the counts add up to {total:.3g} tokens, expected at most {MOST_TOKENS}")


def _checked(counts: npt.ArrayLike, phy2log: IntArray, num_devices: int) -> IntArray:
    """Counts as int64 `[S, E]`, refused unless they fit the plan."""
    array = np.asarray(counts)
    if array.dtype.kind not in "iu":
        raise ValueError(f"counts have dtype {array.dtype}, expected whole numbers of tokens")
    check_total(array)
    array = np.ascontiguousarray(np.atleast_2d(array), dtype=np.int64)
    if array.ndim != 2 or array.shape[0] not in (1, num_devices):
        raise ValueError(
            f"counts have shape {array.shape}, expected [experts], [1, experts] or [{num_devices}, experts]"
        )
    if phy2log.ndim != 1 or phy2log.size % num_devices:
        raise ValueError(f"phy2log has shape {phy2log.shape}, expected one layer's slots, a multiple of {num_devices}")
    if phy2log.max() + 1 != array.shape[1]:
        raise ValueError(f"counts are for {array.shape[1]} experts, the plan holds {phy2log.max() + 1}")
    if array.min() < 0:
        raise ValueError(f"counts hold {array.min()}; tokens cannot be negative")
    return array
