"""ExpertFiles: reads single experts from a model folder's safetensors files, by offset and past the page cache.

Each expert is read directly into its buffer, which has space for the partial pages around the matrices. If the file
stores another dtype, the expert passes through a small read buffer of the loader thread and is cast from there. No file
is read or memory-mapped as a whole.
"""

import json
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.models.layout import MoELayout
from runtime.offload.memory import PAGE, ExpertBuffer, ExpertShape, Key

MAX_HEADER = 100_000_000
"""Bytes. The safetensors format allows no longer header; a larger length means that the file is damaged."""
PIECE = 4 << 20
"""Bytes per read call. A read can be cancelled between two pieces only, so smaller pieces delay demand loads less."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class ReadCancelledError(Exception):
    """A read was cancelled because its expert is no longer needed."""


def never() -> bool:
    """The `stop` function of reads that cannot be cancelled."""
    return False


@dataclass(frozen=True)
class Span:
    """Position of one tensor in a file.

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

    def span(self, name: str, shape: tuple[int, int]) -> Span:
        """Finds a tensor.

        Raises:
            ValueError: If it is missing, has another shape, or has a dtype or an offset that cannot be read.
        """
        if (entry := self.header.get(name)) is None:
            raise ValueError(f"{self.path} has no weights named {name}, but the index lists them; download it again")
        if tuple(entry["shape"]) != shape:
            raise ValueError(f"{self.path}: {name} has shape {entry['shape']}, expected {list(shape)}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if (self.data_start + begin) % dtype.itemsize or end - begin != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError(
                f"{self.path}: {name} is not aligned to its dtype or has the wrong size; "
                "save the model again with save_pretrained"
            )
        return Span(self, self.data_start + begin, end - begin, dtype)


class ExpertFiles:
    """Reads experts of a model folder, from any number of threads at once.

    Args:
        files: The file that holds each tensor, by tensor name; see `data.models.weights.ModelWeights`.
        layout: The model's MoE layers.
        dtype: Dtype to which experts are cast.
        direct: Whether to read past the page cache where the file system supports it. Otherwise the pages are dropped
            from the page cache after each read, so that the experts do not take memory twice.

    Raises:
        ValueError: If files are damaged or lack an expert.
    """

    def __init__(self, files: Mapping[str, Path], layout: MoELayout, dtype: torch.dtype, direct: bool = True) -> None:
        self.shape = ExpertShape(layout.d_ff, layout.d_model, dtype)
        self._read_buffers = threading.local()
        self._files: dict[Path, SafetensorsFile] = {}
        try:
            self._spans = self._find(files, layout, direct)
        except BaseException:
            self.close()
            raise
        widest = max(span.size for spans in self._spans.values() for span in spans)
        self._piece = min(PIECE, -(-widest // PAGE) * PAGE + PAGE)

    def _find(self, files: Mapping[str, Path], layout: MoELayout, direct: bool) -> dict[Key, tuple[Span, Span]]:
        spans = {}
        for layer, module in enumerate(layout.modules):
            for expert in range(layout.num_experts):
                name = f"{module}.expert_{expert}"
                wi = self._span(files, f"{name}.wi.weight", (layout.d_ff, layout.d_model), direct)
                wo = self._span(files, f"{name}.wo.weight", (layout.d_model, layout.d_ff), direct)
                spans[layer, expert] = (wi, wo)
        return spans

    def _span(self, files: Mapping[str, Path], name: str, shape: tuple[int, int], direct: bool) -> Span:
        if name not in files:
            folder = next(iter(files.values())).parent
            raise ValueError(f"{folder} has no weights named {name}; its files are incomplete, download them again")
        path = files[name]
        if path not in self._files:
            self._files[path] = SafetensorsFile(path, direct)
        return self._files[path].span(name, shape)

    def __len__(self) -> int:
        """Number of experts in all layers."""
        return len(self._spans)

    @property
    def reader_bytes(self) -> int:
        """Bytes of the read buffer that each loader thread may allocate."""
        return self._piece

    def has(self, key: Key) -> bool:
        """Whether the model has this expert: all of them are on disk."""
        return key in self._spans

    def read(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Reads one expert into a buffer, on the calling thread.

        Args:
            key: The expert.
            buffer: A buffer in host memory; its matrices are aligned as in the file.
            stop: Called between pieces; True cancels the read.

        Raises:
            OSError: If the file ends early or cannot be read; the message names it.
            ReadCancelledError: If `stop` returned True.
        """
        spans = self._spans[key]
        same_dtype = [span.dtype == self.shape.dtype for span in spans]
        buffer.align(*(span.start % PAGE if same else 0 for span, same in zip(spans, same_dtype, strict=True)))
        for span, same, storage, matrix in zip(spans, same_dtype, buffer.storage, (buffer.wi, buffer.wo), strict=True):
            if same:
                self._read_pages(span, memoryview(storage.numpy()), stop)
            else:
                self._read_cast(span, matrix.view(-1), stop)
            if not span.file.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(span.file.fd, span.start, span.size, os.POSIX_FADV_DONTNEED)

    def _read_pages(self, span: Span, storage: memoryview, stop: Callable[[], bool]) -> None:
        """Reads all pages that a matrix touches into its storage, where it lies at the same byte of a page.

        A matrix of 10,000 bytes at byte 5,000 of the file touches the pages from 4,096 to 16,384. These 12,288 bytes
        are read to the start of the storage, in which the matrix then begins at byte 904 (`ExpertBuffer.align`).
        """
        first, done = span.start - span.start % PAGE, 0
        whole = -(-(span.end - first) // PAGE) * PAGE
        while first + done < span.end:
            count = self._pread(span, storage[done : min(done + PIECE, whole)], first + done, stop)
            done += count if first + done + count >= span.end else count - count % PAGE

    def _read_cast(self, span: Span, target: Tensor, stop: Callable[[], bool]) -> None:
        """Reads a matrix piece by piece into the thread's read buffer and casts each piece into place."""
        pages, typed = self._read_buffer()
        size, done = span.dtype.itemsize, 0
        while done < span.size:
            before = (span.start + done) % PAGE
            count = self._pread(span, pages, span.start + done - before, stop) - before
            fresh = min(count - count % size, span.size - done)
            source = typed[span.dtype][before // size :][: fresh // size]
            target[done // size : (done + fresh) // size].copy_(source)
            done += fresh

    def _pread(self, span: Span, target: memoryview, position: int, stop: Callable[[], bool]) -> int:
        """Reads at a byte of the file; returns the bytes read: at least a page, or all that is left of the matrix."""
        if stop():
            raise ReadCancelledError
        try:
            count = os.preadv(span.file.fd, [target], position)
        except OSError as error:
            raise OSError(
                error.errno, f"{span.file.path} cannot be read at byte {position}: {error.strerror}"
            ) from None
        if position + count < span.end and count < PAGE:
            size = os.fstat(span.file.fd).st_size
            raise OSError(
                f"{span.file.path} has {size} bytes, but {span.end} are needed; it is cut off, download it again"
            )
        return count

    def _read_buffer(self) -> tuple[memoryview, dict[torch.dtype, Tensor]]:
        """The calling thread's own page-aligned read buffer, and the same bytes as a tensor of each dtype."""
        if not hasattr(self._read_buffers, "view"):
            pages = mmap.mmap(-1, self._piece)
            self._read_buffers.view = memoryview(pages)
            self._read_buffers.typed = {dtype: torch.frombuffer(pages, dtype=dtype) for dtype in DTYPES.values()}
        return self._read_buffers.view, self._read_buffers.typed

    def close(self) -> None:
        """Closes all files; no read may be running."""
        while self._files:
            os.close(self._files.popitem()[1].fd)
