"""How many of an expert's tokens go to each of its slots, once the layer has routed and the counts are exact.

`split_by_quota` minimises the most loaded device and, among such splits, keeps tokens on their own device, then on
their own node. `split_evenly` is what shipped balancers do. Both are pure functions of integers: every rank that holds
the same counts and the same plan computes the same quotas.

Shape suffixes: S source devices (1 where the source does not matter), E logical experts, P slots, G devices.
"""

import numpy as np
import numpy.typing as npt

from data.arrays import IntArray
from runtime.balancing.max_flow import even, quotas
from runtime.balancing.plan import ReplicationPlan


def split_by_quota(
    counts: npt.ArrayLike,
    phy2log: IntArray,
    num_devices: int,
    *,
    expert_overhead_tokens: int = 0,
    devices_per_node: int | None = None,
) -> IntArray:
    """Splits a layer's tokens over the slots so that the most loaded device has as little as can be.

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
    if expert_overhead_tokens < 0:
        raise ValueError(f"expert_overhead_tokens is {expert_overhead_tokens}, expected 0 or more")
    node = num_devices if devices_per_node is None else devices_per_node
    if node < 1 or num_devices % node:
        raise ValueError(f"{node} devices a node do not divide {num_devices} devices")
    return quotas(counts_SE, counts_SE.sum(0), phy2log, num_devices, expert_overhead_tokens, node)


def split_evenly(counts: npt.ArrayLike, phy2log: IntArray, num_devices: int) -> IntArray:
    """Splits each expert's tokens evenly over its slots; odd tokens go to its first slots, from source 0's on.

    Args:
        counts: As in `split_by_quota`.
        phy2log: As in `split_by_quota`.
        num_devices: G.

    Returns:
        Quotas `[S, P]`.
    """
    return even(_checked(counts, phy2log, num_devices), phy2log)


def device_load(quotas: IntArray, num_devices: int) -> IntArray:
    """Tokens each device computes under quotas `[S, P]`: int64 `[G]`."""
    return np.asarray(quotas.sum(0).reshape(num_devices, -1).sum(1))


def _checked(counts: npt.ArrayLike, phy2log: IntArray, num_devices: int) -> IntArray:
    """Counts as int64 `[S, E]`, refused where they make no sense."""
    array = np.asarray(counts)
    if array.dtype.kind not in "iu":
        raise ValueError(f"counts have dtype {array.dtype}, expected whole numbers of tokens")
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


def balancedness(device_load_LG: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Mean device load over the largest one, for each layer, `[L]`; 1 is perfect, and so is a layer without tokens."""
    largest = device_load_LG.max(-1)
    mean = device_load_LG.mean(-1)
    result: npt.NDArray[np.float64] = np.divide(mean, largest, out=np.ones_like(mean), where=largest > 0)
    return result


def split_load(load_LE: IntArray, plan: ReplicationPlan) -> IntArray:
    """Tokens each device would compute if a batch with this load ran under a plan, `[L, G]`."""
    return np.stack(
        [
            device_load(split_by_quota(load, phy2log, plan.num_devices), plan.num_devices)
            for load, phy2log in zip(load_LE, plan.phy2log, strict=True)
        ]
    )
