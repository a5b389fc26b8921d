"""SharedBlock: a tensor that other processes on the same machine can read without this process taking part.

On CUDA the memory is opened through its IPC handle, and copies from it run on copy engines. On a CPU it is a file in
memory. A handle is plain JSON.

    block = SharedBlock.zeros((64, 3072, 768), like)        # in one process
    tensor = open_block(block.handle, block.tensor.shape, like)    # in another
"""

import base64
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEMORY = Path("/dev/shm")
"""Linux' file system in memory."""


@dataclass(frozen=True)
class SharedBlock:
    """A tensor of this process, and what another one needs to open it.

    Attributes:
        tensor: The tensor.
        handle: For `open_block`; None if the memory cannot be shared.
    """

    tensor: Tensor
    handle: Any

    @classmethod
    def zeros(cls, shape: Sequence[int], like: Tensor) -> "SharedBlock":
        """Allocates zeros with the dtype and device of a tensor, in ordinary memory if it cannot be shared."""
        if like.device.type == "cuda":
            tensor = like.new_zeros(tuple(shape))
            with suppress(RuntimeError):  # allocators of expandable segments have no handles
                parts = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
                return cls(
                    tensor, [{"bytes": base64.b64encode(p).decode()} if isinstance(p, bytes) else p for p in parts]
                )
            return cls(tensor, None)
        size = math.prod(shape) * like.element_size()
        try:
            number, path = tempfile.mkstemp(prefix="switchcast-", dir=MEMORY)
        except OSError:
            return cls(like.new_zeros(tuple(shape)), None)
        try:
            os.posix_fallocate(number, 0, size)  # a page that is missing later would end the process by SIGBUS
            tensor = torch.from_file(path, shared=True, size=math.prod(shape), dtype=like.dtype).view(tuple(shape))
            return cls(tensor, {"file": f"/proc/{os.getpid()}/fd/{number}", "name": path})
        except OSError:
            os.close(number)
            return cls(like.new_zeros(tuple(shape)), None)
        finally:
            Path(path).unlink()  # at once, so that nothing is left whatever happens; others open it by its number

    def close_to_others(self) -> None:
        """No other process can open the memory from now on; those that have keep it."""
        if isinstance(self.handle, dict):
            os.close(int(self.handle["file"].rpartition("/")[2]))


def open_block(handle: Any, shape: Sequence[int], like: Tensor) -> Tensor:
    """Another process' tensor; it must not be written to.

    Raises:
        OSError: If it is gone.
        RuntimeError: If this device cannot reach its memory.
    """
    if isinstance(handle, dict):
        if os.readlink(handle["file"]) != f"{handle['name']} (deleted)":  # a number of another file by now
            raise OSError(f"{handle['name']} is gone")
        size = math.prod(shape)
        return torch.from_file(handle["file"], shared=True, size=size, dtype=like.dtype).view(tuple(shape))
    parts = [base64.b64decode(part["bytes"]) if isinstance(part, dict) else part for part in handle]
    # opened on the device that reads it, which needs no context on the one that owns it
    storage: Any = torch.UntypedStorage._new_shared_cuda(like.device.index, *parts)
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage).view(tuple(shape))
