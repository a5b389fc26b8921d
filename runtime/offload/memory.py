"""Bytes: budgets as people write them, and memory that holds experts within one.

Shape suffixes: F inner width, D model width.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Key = tuple[int, int]
"""MoE layer and logical expert."""
PAGE = 4096  # bytes that direct reads are aligned to
UNITS = {"": 1, "B": 1} | {f"{name}B": 1000**power for power, name in enumerate("KMGT", 1)}
UNITS |= {f"{name}iB": 1024**power for power, name in enumerate("KMGT", 1)}


def parse_bytes(text: str | int) -> int:
    """Bytes of '2GiB', '512 MiB', '1.5GB' or a plain number.

    Raises:
        ValueError: If it is none of these or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2] not in UNITS:
        raise ValueError(f"'{text}' is no number of bytes; write it like 2GiB, 512MiB or 1500000000")
    if (size := int(float(found[1]) * UNITS[found[2]])) <= 0:
        raise ValueError(f"'{text}' holds nothing; give a budget above 0 bytes")
    return size


def show_bytes(size: float) -> str:
    """The same for people: '2.0 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass(frozen=True)
class ExpertShape:
    """What one expert takes.

    Attributes:
        d_ff: F.
        d_model: D.
        dtype: What it is computed in, and held in wherever it is in memory.
    """

    d_ff: int
    d_model: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return 2 * self.d_ff * self.d_model * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes set aside for one matrix: whole pages, so that a direct read of it may begin anywhere in the first."""
        return -(-self.nbytes // 2 // PAGE) * PAGE + PAGE


@dataclass(eq=False)
class ExpertBuffer:
    """Room for one expert.

    Attributes:
        rooms: Bytes of the two matrices, page-aligned, `[2, room]`.
        shape: The expert's.
        wi: First matrix `[F, D]`, somewhere in its room.
        wo: Second matrix `[D, F]`, likewise.
        key: The expert it holds or is being loaded; None if empty.
        ready: Whether the expert is there.
        idle: A prefetched expert that nobody has used yet.
        read: Records when an accelerator will have finished reading it.
    """

    rooms: Tensor
    shape: ExpertShape
    wi: Tensor = field(init=False)
    wo: Tensor = field(init=False)
    key: Key | None = None
    ready: bool = False
    idle: bool = False
    read: Any = None

    def __post_init__(self) -> None:
        self.align(0, 0)

    def align(self, wi_offset: int, wo_offset: int) -> None:
        """Says at which byte of its room each matrix begins."""
        size, (wi, wo) = self.shape.nbytes // 2, self.rooms
        self.wi = wi[wi_offset : wi_offset + size].view(self.shape.dtype).view(self.shape.d_ff, self.shape.d_model)
        self.wo = wo[wo_offset : wo_offset + size].view(self.shape.dtype).view(self.shape.d_model, self.shape.d_ff)


class BufferPool:
    """Places for experts, allocated at once: what they take never grows.

    Args:
        shape: One expert.
        places: How many.
        device: Where they lie.
        pinned: Page-lock them, so that copies to an accelerator need not wait for the host.

    Raises:
        ValueError: If there is not that much memory.
    """

    def __init__(self, shape: ExpertShape, places: int, device: torch.device, pinned: bool = False) -> None:
        self.shape, self._pinned = shape, pinned
        size = places * 2 * shape.room + PAGE
        if device.type == "cpu" and size > (free := free_bytes()):  # the system promises more than it has
            raise ValueError(f"{show_bytes(size)} for experts, but {show_bytes(free)} are free; lower the budget")
        try:
            self._raw = torch.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError:
            raise ValueError(f"{show_bytes(size)} for experts cannot be had on {device}; lower the budget") from None
        self._raw.zero_()  # now, not under the first reads
        if pinned:  # torch's own pinned allocations are rounded up to a power of two, which no budget would survive
            _check(torch.cuda.cudart().cudaHostRegister(self._raw.data_ptr(), self._raw.nbytes, 0))  # type: ignore[no-untyped-call]
        first = -self._raw.data_ptr() % PAGE
        rooms = self._raw[first : first + places * 2 * shape.room].view(places, 2, shape.room)
        self.places = [ExpertBuffer(room, shape) for room in rooms]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._raw.nbytes

    def release(self) -> None:
        """Gives the memory back and is empty from then on; no place may be in use."""
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._raw.data_ptr()))  # type: ignore[no-untyped-call]
        self._raw, self._pinned, self.places = self._raw.new_empty(0), False, []


def places_within(budget: int, shape: ExpertShape, reserve: int, name: str) -> int:
    """Experts that a budget holds beside `reserve` bytes of buffers.

    Raises:
        ValueError: If it holds none, with the smallest budget that does.
    """
    if (places := (budget - reserve - PAGE) // (2 * shape.room)) < 1:
        least = 2 * shape.room + reserve + PAGE
        raise ValueError(
            f"{name} is {show_bytes(budget)}, too little for one token's expert: {show_bytes(2 * shape.room)} "
            f"and {show_bytes(reserve)} of buffers; give at least {least} bytes ({show_bytes(least)})"
        )
    return places


def free_bytes() -> float:
    """Bytes of memory that processes can still have; without end where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"CUDA could not page-lock host memory ({status}); lower the host memory budget")
