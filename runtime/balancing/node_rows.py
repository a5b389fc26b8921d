"""NodeRows: a plan in which every node is planned as a layer of its own, so that no copy leaves its node.

With groups of experts that stay on their node, a layer on N nodes falls into N problems that share nothing but the
goal: the device with most load. No node can do better than the mean of its own devices, so the layer cannot do better
than the largest of these means. Loads are measured in units of it, and a node with room below it moves nothing.

    2 nodes of 2 devices, groups {0, 1} and {2, 3}, device by device [2 | -1], [3 | 2], [0 | -1], [1 | -1]
    rows = [[0, -1, 1, 0], [0, -1, 1, -1]] on 2 devices: experts are counted anew within their node

Shape suffixes: L MoE layers, N nodes, E logical experts, P slots, K scenarios.
"""

from dataclasses import dataclass

import numpy as np

from data.arrays import Float32Array, IntArray
from runtime.balancing.nodes import check_groups
from runtime.balancing.plan import EMPTY, ReplicationPlan


@dataclass(frozen=True, eq=False)
class NodeRows:
    """A plan, and the same plan with a row for each layer and node.

    Attributes:
        whole: The plan of L layers.
        experts: Experts of each node in ascending order, `[L, N, E / N]`; an expert's place there is its number in the
            rows.
        rows: The plan of L * N rows, on the devices of one node.
    """

    whole: ReplicationPlan
    experts: IntArray
    rows: ReplicationPlan

    @classmethod
    def of(cls, plan: ReplicationPlan, num_groups: int, devices_per_node: int) -> "NodeRows":
        """Divides a plan.

        Raises:
            ValueError: If copies of a group lie on several nodes, nodes hold different numbers of groups, or the
                numbers do not divide.
        """
        check_groups(num_groups, plan.num_devices, devices_per_node, plan.num_experts)
        layers, slots = plan.phy2log.shape
        nodes = plan.num_devices // devices_per_node
        node_LE = plan.homes // (slots // nodes)
        _check_together(plan.phy2log, node_LE, num_groups, nodes)
        order = np.argsort(node_LE, axis=-1, kind="stable")
        number = np.empty_like(order)
        np.put_along_axis(number, order, np.arange(plan.num_experts)[None] % (plan.num_experts // nodes), axis=-1)
        phy2log = _renamed(plan.phy2log, number).reshape(layers * nodes, -1)
        homes = plan.home_slots
        if homes is not None:
            homes = np.take_along_axis(homes, order, axis=-1).reshape(layers * nodes, -1) % (slots // nodes)
        return cls(plan, order.reshape(layers, nodes, -1), ReplicationPlan(phy2log, devices_per_node, homes))

    def divided(
        self, load_LEK: Float32Array, waking_LK: Float32Array, weight_K: Float32Array, price_L: Float32Array
    ) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
        """What `HomePlanner` plans a layer from, for the rows, in units of the largest mean of a node's devices."""
        layers, nodes, _ = self.experts.shape
        load = np.take_along_axis(load_LEK, self.experts.reshape(layers, -1, 1), axis=1)
        load = load.reshape(*self.experts.shape, -1)
        time = load.sum(2) + waking_LK[:, None] * (load > 0).sum(2, dtype=np.float32)
        unit_LK = np.maximum(time.max(1) / np.float32(self.rows.num_devices), np.float32(1))  # 1 in an empty layer
        load = (load / unit_LK[:, None, None]).reshape(layers * nodes, -1, unit_LK.shape[1])
        waking, price = waking_LK / unit_LK, price_L / (unit_LK @ weight_K)
        return load, np.repeat(waking, nodes, axis=0), weight_K, np.repeat(price, nodes)

    def joined(self, rows: ReplicationPlan) -> ReplicationPlan:
        """The plan of L layers that changed rows stand for."""
        layers, nodes, _ = self.experts.shape
        phy2log = _renamed(rows.phy2log, self.experts.reshape(layers * nodes, -1)).reshape(layers, -1)
        if rows.home_slots is self.rows.home_slots:
            return self.whole.with_slots(phy2log)
        first = np.arange(nodes)[:, None] * rows.phy2log.shape[1]
        slots = (rows.homes.reshape(self.experts.shape) + first).reshape(layers, -1)
        homes = np.empty_like(slots)
        np.put_along_axis(homes, self.experts.reshape(layers, -1), slots, axis=-1)
        return ReplicationPlan(phy2log, self.whole.num_devices, homes)


def _renamed(phy2log: IntArray, name: IntArray) -> IntArray:
    """The slots with other numbers for their experts; empty slots stay empty."""
    return np.where(phy2log == EMPTY, EMPTY, np.take_along_axis(name, phy2log, axis=-1))


def _check_together(phy2log: IntArray, node_LE: IntArray, num_groups: int, nodes: int) -> None:
    group = np.arange(node_LE.shape[1]) // (node_LE.shape[1] // num_groups)
    node_LG = node_LE[:, :: node_LE.shape[1] // num_groups]
    there = np.arange(phy2log.shape[1]) // (phy2log.shape[1] // nodes)
    apart = (phy2log != EMPTY) & (node_LG[np.arange(len(phy2log))[:, None], group[phy2log]] != there)
    if apart.any():
        layer, slot = np.argwhere(apart)[0]
        expert = phy2log[layer, slot]
        raise ValueError(
            f"layer {layer}: expert {expert} of group {group[expert]} is on node {there[slot]}, other experts of its "
            f"group on node {node_LG[layer, group[expert]]}; choose homes by flat_homes with num_groups"
        )
    count = (node_LG[..., None] == np.arange(nodes)).sum(1)
    if (count != num_groups // nodes).any():
        layer, node = np.argwhere(count != num_groups // nodes)[0]
        raise ValueError(
            f"layer {layer}: node {node} holds {count[layer, node]} groups of experts, expected "
            f"{num_groups // nodes} on each; choose homes by flat_homes with num_groups"
        )
