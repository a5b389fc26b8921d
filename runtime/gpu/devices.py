"""GPUs by name, with their nominal speeds: what is computed with where nothing was measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuDevice:
    """Nominal figures of a GPU, as its maker states them.

    Attributes:
        name: Name, as `--gpu` takes it.
        memory_bytes: Memory.
        memory_speed: Bytes read from memory in a second.
        operations: Floating-point operations a second in bfloat16; 8-bit units are twice as fast.
        link_speed: Bytes a second that it receives from a GPU of its node.
        network_speed: Bytes a second that it receives from another node.
    """

    name: str
    memory_bytes: float
    memory_speed: float
    operations: float
    link_speed: float
    network_speed: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuDevice("a100_sxm", 80 * 2**30, 2.039e12, 312e12, 300e9, 25e9),
        GpuDevice("h100_sxm", 80 * 2**30, 3.35e12, 989e12, 450e9, 50e9),
        GpuDevice("h200_sxm", 141 * 2**30, 4.8e12, 989e12, 450e9, 50e9),
        GpuDevice("b200_sxm", 180 * 2**30, 7.7e12, 2250e12, 900e9, 100e9),
        GpuDevice("l40s", 45 * 2**30, 0.864e12, 362e12, 32e9, 50e9),
    )
}
GPUS_A_NODE = 8


def gpu_device(name: str) -> GpuDevice:
    """The GPU of that name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in GPUS:
        raise ValueError(f"gpu: unknown '{name}'; choose from {', '.join(GPUS)}")
    return GPUS[name]
