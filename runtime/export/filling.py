"""Fills a plan's empty slots so that the rules of all engines hold: `exportable`.

Every expert has a slot, no slot is empty, and no device holds an expert twice. One rule satisfies all of them: each
empty slot gets the expert with the fewest copies that its device does not hold yet.

    2 devices with [0, 1 | 1] and [2, 3 | -1]: the second copy of 1 on device 0 counts as empty, and both are filled,
    [0, 1 | 2] and [2, 3 | 0]

Shape suffixes: L MoE layers, P slots.
"""

import numpy as np

from runtime.balancing.plan import EMPTY, ReplicationPlan


def exportable(plan: ReplicationPlan) -> ReplicationPlan:
    """The plan that engines are given.

    A second copy on a device serves nothing, because the first computes the same tokens there, and vllm-ascend numbers
    its slots wrongly where there is one. It counts as empty; an expert's home stays.

    Raises:
        ValueError: If a device has more slots than there are experts, so that some expert must be on it twice.
    """
    if plan.slots_per_device > plan.num_experts:
        raise ValueError(
            f"a device has {plan.slots_per_device} slots for {plan.num_experts} experts, so that some expert would be "
            f"on it twice; plan at most {(plan.num_devices - 1) * plan.num_experts} redundant experts"
        )
    phy2log = plan.phy2log.copy()
    for row, is_home in zip(phy2log, plan.is_home_slot, strict=True):
        for first in range(0, len(row), plan.slots_per_device):
            slots = np.arange(first, first + plan.slots_per_device)
            slots = slots[np.argsort(~is_home[slots], kind="stable")]  # homes first: they are kept
            _, kept = np.unique(row[slots], return_index=True)
            row[np.delete(slots, kept)] = EMPTY
    return plan.with_slots(phy2log).filled()


def refilled(plan: ReplicationPlan) -> tuple[int, int]:
    """Empty slots of a plan, and slots with a second copy of an expert on its device, over all layers."""
    empty = int((plan.phy2log == EMPTY).sum())
    blocks = np.sort(plan.phy2log.reshape(-1, plan.slots_per_device), axis=-1)
    return empty, int(((blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] != EMPTY)).sum())


def own_order(num_experts: int, num_slots: int) -> list[int]:
    """A row for a layer that no plan is for: experts in their own order, again and again, `[P]`."""
    return (np.arange(num_slots) % num_experts).tolist()
