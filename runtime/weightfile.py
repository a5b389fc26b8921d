"""WeightFile: one safetensors file, open for reading by offset; its header is read once."""

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.memory import PAGE

LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: `size` bytes from `start` on in a file, in a stored dtype."""

    file: "WeightFile"
    start: int
    size: int
    dtype: torch.dtype


class WeightFile:
    """One safetensors file, open for reading by offset.

    Args:
        path: The file.
        direct: Read past the page cache where the file system can.

    Raises:
        ValueError: If it is no safetensors file or shorter than its header says.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self.path, self.direct = path, direct and hasattr(os, "O_DIRECT")
        self.fd = os.open(path, os.O_RDONLY)
        try:
            self.header, self.data = self._read_header()
        except BaseException:
            os.close(self.fd)
            raise
        if self.direct:
            self._open_direct()

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header, and where the tensors begin."""
        size = os.fstat(self.fd).st_size
        length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ValueError(f"{self.path} is no safetensors file, or was cut off in its header; fetch it again")
        try:
            header: dict[str, Any] = json.loads(os.pread(self.fd, length, 8))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} has a damaged safetensors header; fetch it again") from None
        if (whole := 8 + length + max(ends, default=0)) > size:
            raise ValueError(
                f"{self.path} has {size} bytes where its header says {whole}; it was cut off, fetch it again"
            )
        return header, 8 + length

    def _open_direct(self) -> None:
        """Swaps the descriptor for a direct one if a first read through it works."""
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

    def span(self, name: str, shape: tuple[int, int]) -> Span:
        """Where a tensor lies.

        Raises:
            ValueError: If it is missing, has another shape, or a dtype or place that cannot be read.
        """
        if (entry := self.header.get(name)) is None:
            raise ValueError(f"{self.path} has no weights named {name}, though the index says so; fetch it again")
        if tuple(entry["shape"]) != shape:
            raise ValueError(f"{self.path}: {name} has shape {entry['shape']}, expected {list(shape)}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if (self.data + begin) % dtype.itemsize or end - begin != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(f"{self.path}: {name} lies at odd bytes; save the model again with save_pretrained")
        return Span(self, self.data + begin, end - begin, dtype)
