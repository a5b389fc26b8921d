"""check_arguments: refuses arguments of `Engine` that are of another type or do not go together."""

from typing import Any

from data.arguments import check_whole


def check_arguments(
    world: int,
    num_devices: Any,
    num_redundant_experts: Any,
    max_moves: Any,
    devices_per_node: Any,
    num_groups: Any,
    expert_overhead_tokens: Any,
    device_memory: Any,
    host_memory: Any,
) -> None:
    """Checks what can be checked before a model is loaded.

    All arguments but `world`, the number of processes, are those of `Engine`.

    Raises:
        ValueError: Naming the argument, its value and what was expected.
    """
    least = {
        "num_devices": (num_devices, 1), "num_redundant_experts": (num_redundant_experts, 0),
        "max_moves": (max_moves, 0), "devices_per_node": (devices_per_node, 1),
        "num_groups": (num_groups, 1),
    }  # fmt: skip
    for name, (value, smallest) in least.items():
        if value is not None:
            check_whole(name, value, smallest)
    if isinstance(expert_overhead_tokens, str) and expert_overhead_tokens != "auto":
        raise ValueError(f"expert_overhead_tokens is {expert_overhead_tokens!r}, expected 0 or more, or 'auto'")
    if expert_overhead_tokens != "auto":
        check_whole("expert_overhead_tokens", expert_overhead_tokens, 0)
    if host_memory is not None and device_memory is None:
        raise ValueError(f"host_memory is {host_memory} without device_memory; give both, or neither")
    if device_memory is not None and world == 1 and num_devices not in (None, 1):
        raise ValueError(
            f"num_devices is {num_devices}; within a budget a process is one device: use torchrun for more"
        )
