"""Balancedness: how evenly a layer's tokens lie on the devices."""

import numpy as np
import numpy.typing as npt

from runtime.plan import IntArray, ReplicationPlan
from runtime.split import device_load, split_by_quota


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
