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
from typing import IO, Any

import torch
from torch import Tensor

MEMORY = Path("/dev/shm")
"""Linux' file system in memory."""


@dataclass(frozen=True)
class SharedBlock:
    """A tensor of this process, and what another one needs to open it.

    Attributes:
        tensor: The tensor.
        handle: For `open_block`, as long as this object lives; None if the memory cannot be shared.
        file: The open file that the handle names.
    """

    tensor: Tensor
    handle: Any = None
    file: IO[bytes] | None = None

    @classmethod
    def zeros(cls, shape: Sequence[int], like: Tensor) -> "SharedBlock":
        """Allocates zeros with the dtype and device of a tensor, in ordinary memory if it cannot be shared."""
        if like.device.type == "cuda":
            tensor = like.new_zeros(tuple(shape))
            with suppress(RuntimeError):  # allocators of expandable segments have no handles
                _, *parts = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
                text = [{"bytes": base64.b64encode(p).decode()} if isinstance(p, bytes) else p for p in parts]
                return cls(tensor, text)
            return cls(tensor)
        size = math.prod(shape)
        with suppress(OSError):
            # unlinked when it is closed below, so that nothing is left whatever happens; others open it by its number
            with tempfile.NamedTemporaryFile(prefix="switchcast-", dir=MEMORY) as named:
                os.posix_fallocate(named.fileno(), 0, size * like.element_size())  # else SIGBUS where a page is missing
                tensor = torch.from_file(named.name, shared=True, size=size, dtype=like.dtype).view(tuple(shape))
                file = os.fdopen(os.dup(named.fileno()), "rb")
            return cls(tensor, {"file": f"/proc/{os.getpid()}/fd/{file.fileno()}", "name": named.name}, file)
        return cls(like.new_zeros(tuple(shape)))


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
