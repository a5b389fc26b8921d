"""Bytes: budgets as people write them, and memory that holds experts within one.

Shape suffixes: N places, F inner width, D model width.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


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


class Pool:
    """Places for experts, allocated at once: what they take never grows.

    Args:
        shape: One expert.
        places: N.
        device: Where they lie.
        pinned: Page-lock them, so that copies to an accelerator need not wait for the host.
    """

    def __init__(self, shape: ExpertShape, places: int, device: torch.device, pinned: bool = False) -> None:
        self.wi_NFD = torch.empty(places, shape.d_ff, shape.d_model, dtype=shape.dtype, device=device)
        self.wo_NDF = torch.empty(places, shape.d_model, shape.d_ff, dtype=shape.dtype, device=device)
        # torch's own pinned allocations are rounded up to a power of two, which no budget would survive
        self._pinned = [self.wi_NFD, self.wo_NDF] if pinned else []
        for tensor in self._pinned:
            _check(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.wi_NFD)

    @property
    def nbytes(self) -> int:
        """Bytes of all places."""
        return self.wi_NFD.nbytes + self.wo_NDF.nbytes

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.wi_NFD[place], self.wo_NDF[place]

    def release(self) -> "Pool":
        """Gives the memory back and is empty from then on; no view of a place may be in use."""
        while self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr()))  # type: ignore[no-untyped-call]
        self.wi_NFD = self.wi_NFD.new_empty(0, *self.wi_NFD.shape[1:])
        self.wo_NDF = self.wo_NDF.new_empty(0, *self.wo_NDF.shape[1:])
        return self


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"CUDA could not page-lock host memory ({status}); lower the host memory budget")
