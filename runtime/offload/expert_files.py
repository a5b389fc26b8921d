"""ExpertFiles: reads single experts out of a model folder's safetensors files, past the page cache.

An expert is read by offset straight into its place, which has room for the pages around it; where the file has another
dtype it goes through a small buffer of the reading thread. No file is ever read or mapped as a whole.
"""

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.models.layout import MoELayout
from runtime.offload.memory import PAGE, ExpertBuffer, ExpertShape, Key

LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: `size` bytes from `start` on in a file, in a stored dtype."""

    file: "SafetensorsFile"
    start: int
    size: int
    dtype: torch.dtype


class SafetensorsFile:
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


PIECE = 4 << 20  # bytes read at once; between pieces a read can be given up


class ReadCancelledError(Exception):
    """A read was given up because nobody waits for it any more."""


def never() -> bool:
    """For reads that are not to be given up."""
    return False


class ExpertFiles:
    """Reads experts of a model folder, from as many threads as there are.

    Args:
        files: The file that holds each tensor; see `data.models.weights.ModelWeights`.
        layout: The model's MoE layers.
        dtype: What experts are cast to.
        direct: Read past the page cache where the file system can; else what was read is dropped from it.

    Raises:
        ValueError: If files are damaged or lack an expert.
    """

    def __init__(self, files: Mapping[str, Path], layout: MoELayout, dtype: torch.dtype, direct: bool = True) -> None:
        self.shape = ExpertShape(layout.d_ff, layout.d_model, dtype)
        self._buffers = threading.local()
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
        for layer, module in enumerate(layout.module_names):
            for expert in range(layout.num_experts):
                name = f"{module}.experts.expert_{expert}"
                wi = self._span(files, f"{name}.wi.weight", (layout.d_ff, layout.d_model), direct)
                wo = self._span(files, f"{name}.wo.weight", (layout.d_model, layout.d_ff), direct)
                spans[layer, expert] = (wi, wo)
        return spans

    def _span(self, files: Mapping[str, Path], name: str, shape: tuple[int, int], direct: bool) -> Span:
        if name not in files:
            raise ValueError(
                f"{next(iter(files.values())).parent} has no weights named {name}; its files are incomplete"
            )
        path = files[name]
        if path not in self._files:
            self._files[path] = SafetensorsFile(path, direct)
        return self._files[path].span(name, shape)

    def __len__(self) -> int:
        """Experts in all."""
        return len(self._spans)

    def keys(self) -> Iterable[Key]:
        """All experts."""
        return self._spans

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return all(file.direct for file in self._files.values())

    @property
    def reader_bytes(self) -> int:
        """Bytes of the buffer each reading thread holds."""
        return self._piece

    def has(self, key: Key) -> bool:
        """Every expert is on disk; see `runtime.offload.tier.Source`."""
        return key in self._spans

    def read(self, key: Key, place: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Reads one expert into place, on the calling thread.

        Args:
            key: Which expert.
            place: Where it goes, in host memory.
            stop: Asked between pieces; True gives the read up.

        Raises:
            OSError: If the file ends early or cannot be read; the message names it.
            ReadCancelledError: If `stop` said so.
        """
        spans = self._spans[key]
        straight = [span.dtype == self.shape.dtype for span in spans]
        place.align(*(span.start % PAGE if plain else 0 for span, plain in zip(spans, straight, strict=True)))
        for span, plain, room, matrix in zip(spans, straight, place.rooms, (place.wi, place.wo), strict=True):
            if plain:
                self._read_straight(span, memoryview(room.numpy()), stop)
            else:
                self._read_cast(span, matrix.view(-1), stop)
            if not span.file.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(span.file.fd, span.start, span.size, os.POSIX_FADV_DONTNEED)

    def _read_straight(self, span: Span, room: memoryview, stop: Callable[[], bool]) -> None:
        """Reads the pages around a matrix into its room, which has the matrix at the same byte of a page."""
        first, done = span.start - span.start % PAGE, 0
        last = span.start + span.size
        whole = -(-(last - first) // PAGE) * PAGE
        while first + done < last:
            count = self._pread(span, room[done : min(done + PIECE, whole)], first + done, stop)
            done += count if first + done + count >= last else count - count % PAGE

    def _read_cast(self, span: Span, target: Tensor, stop: Callable[[], bool]) -> None:
        """Reads a matrix piece by piece into a buffer and casts it from there."""
        buffer, typed = self._buffer()
        size, done = span.dtype.itemsize, 0
        while done < span.size:
            before = (span.start + done) % PAGE
            count = self._pread(span, buffer, span.start + done - before, stop) - before
            fresh = min(count - count % size, span.size - done)
            source = typed[span.dtype][before // size :][: fresh // size]
            target[done // size : (done + fresh) // size].copy_(source)
            done += fresh

    def _pread(self, span: Span, target: memoryview, position: int, stop: Callable[[], bool]) -> int:
        """Reads what comes at a position, at least a page of it or all there is of the matrix."""
        if stop():
            raise ReadCancelledError
        try:
            count = os.preadv(span.file.fd, [target], position)
        except OSError as error:
            raise OSError(
                error.errno, f"{span.file.path} cannot be read at byte {position}: {error.strerror}"
            ) from None
        last = span.start + span.size
        if position + count < last and count < PAGE:
            held = os.fstat(span.file.fd).st_size
            raise OSError(f"{span.file.path} has {held} bytes where {last} are needed; it was cut off, fetch it again")
        return count

    def _buffer(self) -> tuple[memoryview, dict[torch.dtype, Tensor]]:
        """The calling thread's own buffer, page-aligned, and the same as tensors."""
        if not hasattr(self._buffers, "view"):
            pages = mmap.mmap(-1, self._piece)
            self._buffers.view = memoryview(pages)
            self._buffers.typed = {dtype: torch.frombuffer(pages, dtype=dtype) for dtype in DTYPES.values()}
        return self._buffers.view, self._buffers.typed

    def close(self) -> None:
        """Closes all files; no read may be under way."""
        while self._files:
            os.close(self._files.popitem()[1].fd)
