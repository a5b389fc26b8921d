"""Pretends that this machine has CUDA devices, so that the GPU path runs on a CPU with real values and is counted.

    with pretending() as counts:
        model.to("cuda")
        model(ids.to("cuda"))
    counts.total("sync"), counts.by_site("kernel"), print(counts)

Tensors on pretended devices are `CudaTensor`s. Threads that are started inside are covered too. What it cannot see:
kernels' own errors and last bits, NCCL's semantics, memory that an allocator gives away again, and time.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.helpers import cuda_streams as streams
from tests.helpers.collectives import watched_collectives
from tests.helpers.cuda_collectives import on_collective_stream
from tests.helpers.cuda_requests import COUNTS, RequestCounts
from tests.helpers.cuda_tensor import CudaMode, register, unpin_all, unregister
from tests.helpers.host_order import ordered_threads

MEMORY = 80 << 30
"""Bytes of memory that a pretended device has."""
_open = threading.Lock()


@contextmanager
def pretending(devices: int = 1) -> Iterator[RequestCounts]:
    """A context in which `torch.cuda` has this many devices; gives the counts, at zero. Leaving it restores everything.

    Raises:
        RuntimeError: If another such context is open.
    """
    if not _open.acquire(blocking=False):
        raise RuntimeError("CUDA is pretended already; leave that context first")
    try:
        with ExitStack() as stack:
            COUNTS.reset()
            streams.forget()
            torch._C._ensureCUDADeviceGuardSet()  # without a driver: switching devices inside torch does nothing
            lift = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then uploads visibly
            stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
            swap = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to: a parameter becomes a CudaTensor
            stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
            stack.callback(unpin_all)
            for name, value in _torch_cuda(devices).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(ordered_threads(CudaMode))
            stack.enter_context(CudaMode())
            stack.enter_context(watched_collectives(on_collective_stream))
            yield COUNTS
    finally:
        _open.release()


def _torch_cuda(devices: int) -> dict[str, Any]:
    """What is replaced in `torch.cuda`."""
    real_init, available = torch.cuda._lazy_init, torch.cuda.is_available()
    properties = SimpleNamespace(
        name="Pretended H100", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, is_integrated=False
    )
    return {
        "_lazy_init": real_init if available else lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=_register, cudaHostUnregister=_unregister),
        "Stream": streams.Stream,
        "Event": streams.Event,
        "StreamContext": streams.StreamContext,
        "stream": streams.StreamContext,
        "device": streams.DeviceContext,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "set_stream": streams.set_stream,
        "synchronize": streams.synchronize,
        "set_device": _refusing_ordinals(devices),
        "current_device": streams.current_device,
    }


def _refusing_ordinals(devices: int) -> Any:
    def set_device(device: Any) -> None:
        if not 0 <= streams.device_index(device) < devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        streams.set_device(device)

    return set_device


def _register(place: int, nbytes: int, flags: int) -> int:
    register(place, nbytes)
    return 0


def _unregister(place: int) -> int:
    unregister(place)
    return 0
