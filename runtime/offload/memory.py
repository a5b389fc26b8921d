"""The expert buffers allocated within a memory budget.

Shape suffixes: F inner width, D model width.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.byte_sizes import show_bytes

Key = tuple[int, int]
"""One expert of the model: its MoE layer and its logical expert number."""
PAGE = 4096
"""Bytes of a page. Direct reads begin at a multiple of it, in the file and in memory."""


@dataclass(frozen=True)
class ExpertShape:
    """Size of one expert.

    Attributes:
        d_ff: F.
        d_model: D.
        dtype: Dtype of the weights in every tier of memory; files may store another one.
    """

    d_ff: int
    d_model: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return 2 * self.d_ff * self.d_model * self.dtype.itemsize

    @property
    def padded_bytes(self) -> int:
        """Bytes reserved for one matrix: its whole pages and one more.

        A direct read copies whole pages of the file, and the matrix may begin at any byte of the first page. A matrix
        of 10,000 bytes touches up to 4 pages, so 4 * 4096 bytes are reserved.
        """
        return -(-self.nbytes // 2 // PAGE) * PAGE + PAGE


@dataclass(eq=False)
class ExpertBuffer:
    """Memory for one expert.

    Attributes:
        storage: Bytes reserved for the two matrices, page-aligned, `[2, padded_bytes]`.
        shape: Size of the expert.
        wi: First matrix `[F, D]`, a view into the first row of `storage`.
        wo: Second matrix `[D, F]`, a view into the second row.
        key: The expert that the buffer holds or that is being loaded into it; None if it is empty.
        ready: Whether loading has finished.
        unused: Whether the expert was prefetched and has not been used since.
        last_read: CUDA event after the last kernel that reads the buffer; None on a CPU.
    """

    storage: Tensor
    shape: ExpertShape
    wi: Tensor = field(init=False)
    wo: Tensor = field(init=False)
    key: Key | None = None
    ready: bool = False
    unused: bool = False
    last_read: Any = None

    def __post_init__(self) -> None:
        self.align(0, 0)

    def align(self, wi_offset: int, wo_offset: int) -> None:
        """Sets the byte at which each matrix begins in its row of `storage`."""
        size, (wi, wo) = self.shape.nbytes // 2, self.storage
        self.wi = wi[wi_offset : wi_offset + size].view(self.shape.dtype).view(self.shape.d_ff, self.shape.d_model)
        self.wo = wo[wo_offset : wo_offset + size].view(self.shape.dtype).view(self.shape.d_model, self.shape.d_ff)


class BufferPool:
    """A fixed number of expert buffers in one allocation, which never grows.

    Args:
        shape: Size of one expert.
        count: Number of buffers.
        device: Device of the memory.
        page_locked: Whether to page-lock host memory, so that copies to an accelerator run asynchronously.

    Raises:
        ValueError: If that much memory is not available.
    """

    def __init__(self, shape: ExpertShape, count: int, device: torch.device, page_locked: bool = False) -> None:
        self.shape, self._page_locked = shape, page_locked
        size = count * 2 * shape.padded_bytes + PAGE
        if device.type == "cpu" and size > (free := free_bytes()):  # Linux grants allocations beyond free memory
            raise ValueError(
                f"experts need {show_bytes(size)}, but only {show_bytes(free)} are free; lower the memory budget"
            )
        try:
            self._raw = torch.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError:
            raise ValueError(
                f"{show_bytes(size)} could not be allocated on {device}; lower the memory budget"
            ) from None
        self._raw.zero_()  # maps the pages now rather than during the first reads
        if page_locked:  # torch rounds its own pinned allocations up to a power of two, which would break the budget
            _check(torch.cuda.cudart().cudaHostRegister(self._raw.data_ptr(), self._raw.nbytes, 0))  # type: ignore[no-untyped-call]
        first = -self._raw.data_ptr() % PAGE
        used = self._raw[first : first + count * 2 * shape.padded_bytes]
        self.buffers = [ExpertBuffer(storage, shape) for storage in used.view(count, 2, shape.padded_bytes)]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._raw.nbytes

    def release(self) -> None:
        """Frees the memory; no buffer may be in use. The pool is empty afterwards."""
        if self._page_locked:
            _check(torch.cuda.cudart().cudaHostUnregister(self._raw.data_ptr()))  # type: ignore[no-untyped-call]
        self._raw, self._page_locked, self.buffers = self._raw.new_empty(0), False, []


def buffers_within(budget: int, shape: ExpertShape, reserve: int, name: str) -> int:
    """Number of expert buffers that fit in a budget.

    Args:
        budget: Bytes.
        shape: Size of one expert.
        reserve: Bytes of the budget that the loader threads' read buffers take.
        name: Option that set the budget, for the error.

    Raises:
        ValueError: If not one buffer fits; the message has the smallest budget that suffices.
    """
    if (count := (budget - reserve - PAGE) // (2 * shape.padded_bytes)) < 1:
        least = 2 * shape.padded_bytes + reserve + PAGE
        raise ValueError(
            f"{name} is {show_bytes(budget)}, too little for one expert, which takes "
            f"{show_bytes(2 * shape.padded_bytes)} and {show_bytes(reserve)} of read buffers; "
            f"give at least {least} bytes ({show_bytes(least)})"
        )
    return count


def free_bytes() -> float:
    """Bytes of memory that processes can still allocate; infinite where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"CUDA could not page-lock host memory (error {status}); lower host_memory")
