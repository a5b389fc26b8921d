"""SafetensorsFile: one safetensors file, open for direct reads of the bytes of single tensors."""

import json
import mmap
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from data.models.stored_experts import Part
from runtime.offload.memory import PAGE

MAX_HEADER = 100_000_000
"""Bytes. The safetensors format allows no longer header; a larger length means that the file is damaged."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Span:
    """Position of a tensor, or of several neighbours, in a file.

    Attributes:
        file: The file.
        start: Byte of the file at which the tensor begins.
        size: Bytes of the tensor.
        dtype: Dtype in which the file stores it.
    """

    file: "SafetensorsFile"
    start: int
    size: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """Byte of the file after the tensor's last."""
        return self.start + self.size

    def joined(self, following: "Span") -> "Span | None":
        """Both spans in one, if the following one begins where this one ends."""
        neighbours = self.file is following.file and self.end == following.start and self.dtype == following.dtype
        return replace(self, size=self.size + following.size) if neighbours else None


class SafetensorsFile:
    """One safetensors file, open for reading by offset.

    Args:
        path: The file.
        direct: Whether to read past the page cache where the file system supports it.

    Raises:
        ValueError: If the file is not in the safetensors format, or is shorter than its header requires.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self.path, self.direct = path, direct and hasattr(os, "O_DIRECT")
        self.fd = os.open(path, os.O_RDONLY)
        try:
            self.header, self.data_start = self._read_header()
        except BaseException:
            os.close(self.fd)
            raise
        if self.direct:
            self._open_direct()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Returns the header and the byte at which the tensors begin."""
        size = os.fstat(self.fd).st_size
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{self.path} is not a safetensors file, or its header is cut off; download it again")
        try:
            header: dict[str, Any] = json.loads(os.pread(self.fd, length, 8))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} has a damaged safetensors header; download it again") from None
        if (expected := 8 + length + max(ends, default=0)) > size:
            raise ValueError(
                f"{self.path} has {size} bytes, but its header requires {expected}; it is cut off, download it again"
            )
        return header, 8 + length

    def _open_direct(self) -> None:
        """Replaces the file descriptor by one for direct reads, if a first direct read succeeds."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            self.direct = False
            return
        try:
            with mmap.mmap(-1, PAGE) as page:
                os.preadv(fd, [page], 0)
        except OSError:
            os.close(fd)
            self.direct = False
            return
        os.close(self.fd)
        self.fd = fd

    def shape(self, part: Part) -> tuple[int, ...]:
        """Shape of a stored tensor, or of one of its rows.

        Raises:
            ValueError: If the file lacks it.
        """
        if (entry := self.header.get(part.name)) is None:
            raise ValueError(
                f"{self.path} has no weights named {part.name}, but the index lists them; download it again"
            )
        shape = tuple(entry["shape"])
        if part.row is None:
            return shape
        if not shape or part.row >= shape[0]:
            raise ValueError(f"{self.path}: {part.name} has shape {list(shape)}, and no row {part.row}")
        return shape[1:]

    def span(self, part: Part) -> Span:
        """Finds a stored tensor, or one of its rows.

        Raises:
            ValueError: If the file lacks it, or it has a dtype or an offset that cannot be read.
        """
        shape, entry = self.shape(part), self.header[part.name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{self.path}: {part.name} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)}"
            )
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if (self.data_start + begin) % dtype.itemsize or end - begin != prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(
                f"{self.path}: {part.name} is not aligned to its dtype or has the wrong size; "
                "save the model again with save_pretrained"
            )
        size = prod(shape) * dtype.itemsize
        return Span(self, self.data_start + begin + (part.row or 0) * size, size, dtype)
