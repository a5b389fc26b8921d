"""What a move between nodes costs, measured: an expert's weights are copied as a move copies them, near and far.

Within a machine a move reads mapped memory, between machines it goes through gloo, so the link alone does not tell. The
weights go into a standby buffer, which nothing reads.
"""

from statistics import median

import numpy as np

from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.experts.transfer import WeightTransfer

REPEATS = 5
"""Times of each kind, of which the median counts; one more before them opens the connections."""
LEAST_BYTES = 4 << 20
"""Bytes that are copied for one time; a small expert is copied again and again, because microseconds scatter."""


def measure_between_nodes(transfer: WeightTransfer, devices_per_node: int | None) -> float | None:
    """Time of a move between nodes, relative to one within a node, 1 or more; all ranks call this and get one figure.

    The rank that receives measures. If a copy within the node takes 1 ms and one from another node 8 ms, it is 8.

    Args:
        transfer: Carries out the moves; nothing else may use it meanwhile.
        devices_per_node: Devices that share a fast network; None means one node.

    Returns:
        None where nothing can be compared: on one rank, on one node, with one device a node, without replica slots.
    """
    ranks, plan = transfer.ranks, transfer.plan
    if ranks.world == 1 or devices_per_node is None or (moves := example_moves(plan, devices_per_node)) is None:
        return None
    with ranks.watched():
        count = -(-LEAST_BYTES // transfer.layers[0].expert_bytes)
        near, far = (median([transfer.seconds([move] * count) for _ in range(1 + REPEATS)][1:]) for move in moves)
        times = ranks.exchange("times of moves", (near, far))
    near, far = times[transfer.owner(moves[0].slot)]
    return max(1.0, float(far) / max(float(near), 1e-9))


def example_moves(plan: ReplicationPlan, devices_per_node: int) -> tuple[SlotMove, SlotMove] | None:
    """Two moves into one replica slot of the first layer: from another device of its node, and from another node."""
    home_E, each = plan.homes[0], plan.slots_per_device
    device_E = home_E // each
    for slot in np.flatnonzero(~plan.is_home_slot[0]).tolist():
        same = device_E // devices_per_node == slot // each // devices_per_node
        near, far = np.flatnonzero(same & (device_E != slot // each)), np.flatnonzero(~same)
        if near.size and far.size:
            first, second = (SlotMove(0, slot, int(found[0]), int(home_E[found[0]])) for found in (near, far))
            return first, second
    return None
