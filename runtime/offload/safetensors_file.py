"""SafetensorsFile: one safetensors file, open for direct reads of the bytes of single tensors."""

import json
import mmap
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data.models.stored_experts import Part
from runtime.offload.memory import PAGE

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


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
        ValueError: If the file is not in the safetensors format: damaged, cut off, or with tensors that overlap.
    """

    def __init__(self, path: Path, direct: bool) -> None:
        self.path, self.direct = path, direct and hasattr(os, "O_DIRECT")
        self.header, self.data_start = _read_header(path)
        self.fd = os.open(path, os.O_RDONLY)
        if self.direct:
            self._open_direct()

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
        dtype, begin = DTYPES[entry["dtype"]], entry["data_offsets"][0]
        if (self.data_start + begin) % dtype.itemsize:
            raise ValueError(
                f"{self.path}: {part.name} is not aligned to its dtype; save the model again with save_pretrained"
            )
        size = prod(shape) * dtype.itemsize
        return Span(self, self.data_start + begin + (part.row or 0) * size, size, dtype)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header and the byte at which the tensors begin, after safetensors has checked both."""
    try:
        with safe_open(path, framework="pt"):  # maps the file, reads the header alone
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged or cut off ({error}); download it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length
