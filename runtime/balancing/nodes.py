"""Nodes of devices that share a fast network, and groups of experts that stay on one: what goes together.

A router with group-limited routing, such as DeepSeek-V3's, first chooses groups of experts for a token, then experts
within them. The token visits no more nodes than groups, as long as all copies of a group's experts lie on one node.
Group i is the experts from `i * E / num_groups` to `(i + 1) * E / num_groups - 1`, as in EPLB.
"""


def check_nodes(num_devices: int, devices_per_node: int | None) -> None:
    """Refuses nodes that do not divide the devices; None is one node.

    Raises:
        ValueError: Naming both figures.
    """
    if devices_per_node is not None and (devices_per_node < 1 or num_devices % devices_per_node):
        raise ValueError(
            f"devices_per_node is {devices_per_node}, which does not divide {num_devices} devices; choose a divisor, "
            "or leave it out for one node"
        )


def check_groups(
    num_groups: int | None, num_devices: int, devices_per_node: int | None, num_experts: int | None = None
) -> None:
    """Refuses nodes as `check_nodes` does, and groups that do not divide the experts or fill the nodes equally.

    Args:
        num_groups: Groups of experts; None is none.
        num_devices: G.
        devices_per_node: Devices of a node; None is one node.
        num_experts: E; None where it is not known yet.

    Raises:
        ValueError: Naming the figures.
    """
    check_nodes(num_devices, devices_per_node)
    if num_groups is None:
        return
    if devices_per_node is None:
        raise ValueError(
            f"{num_groups} groups of experts stay on their nodes, and devices_per_node is not given; give both, or "
            "leave out the groups"
        )
    nodes = num_devices // devices_per_node
    if num_groups < 1 or num_groups % nodes:
        raise ValueError(
            f"{num_groups} groups of experts cannot be shared equally by {nodes} nodes of {devices_per_node} devices; "
            "choose a multiple of the nodes, or leave out the groups"
        )
    if num_experts is not None and num_experts % num_groups:
        raise ValueError(f"{num_experts} experts do not divide into {num_groups} groups; choose a divisor")
