"""ExpertFiles: reads single experts from a model folder's safetensors files, by offset and past the page cache.

Each expert is read directly into its buffer, which has space for the partial pages around its tensors. A tensor stored
in several parts, such as a gate and the matrix beside it, is put together by where its parts are read to. Where a file
stores another dtype, or a part begins at another byte of a page than in the buffer, the part passes through a small
read buffer of the loader thread. No file is read or memory-mapped as a whole.

Where a family's files need another conversion than that, experts are read and converted as transformers does
(`ExpertReader.read`), which takes longer, and more memory, and is logged.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from data.models.layout import MoELayout
from data.models.stored_experts import ExpertReader, Part
from runtime.offload.memory import PAGE, ExpertBuffer, ExpertShape, Key
from runtime.offload.safetensors_file import DTYPES, SafetensorsFile, Span

log = logging.getLogger(__name__)

PIECE = 4 << 20
"""Bytes per read call. A read can be cancelled between two pieces only, so smaller pieces delay demand loads less."""


class ReadCancelledError(Exception):
    """A read was cancelled because its expert is no longer needed."""


def never() -> bool:
    """The `stop` function of reads that cannot be cancelled."""
    return False


class ExpertFiles:
    """Reads experts of a model folder, from any number of threads at once.

    Args:
        stored: The experts in the files.
        layout: The model's MoE layers.
        dtype: Dtype to which experts are cast.
        direct: Whether to read past the page cache where the file system supports it. Otherwise the pages are dropped
            from the page cache after each read, so that the experts do not take memory twice.

    Attributes:
        shape: Size of one expert.
        converts: Whether experts are converted after they are read, because their bytes are stored in another order.

    Raises:
        ValueError: If files are damaged or lack an expert.
    """

    def __init__(self, stored: ExpertReader, layout: MoELayout, dtype: torch.dtype, direct: bool = True) -> None:
        self.shape, self._stored = ExpertShape(stored.format.shapes, dtype), stored
        self._read_buffers = threading.local()
        self._files: dict[Path, SafetensorsFile] = {}
        self._spans: dict[Key, list[list[Span]]] = {}
        keys = list(product(range(layout.num_layers), range(layout.num_experts)))
        try:
            for key in keys:
                self._spans[key] = self._find(key, direct)
        except BaseException:
            self.close()
            raise
        self.converts = not all(self._spans.values())
        if self.converts:
            log.warning(
                "%s stores experts of a %s model in a form that is converted when it is read: each load takes longer, "
                "and goes through the page cache", stored.weights.model, layout.family,
            )  # fmt: skip
        widest = max((span.size for spans in self._spans.values() for each in spans for span in each), default=0)
        self._piece = min(PIECE, -(-widest // PAGE) * PAGE + PAGE)

    def _find(self, key: Key, direct: bool) -> list[list[Span]]:
        """The spans of each tensor of an expert; none if it is to be converted."""
        if (tensors := self._stored.parts(*key)) is None:
            return []
        return [
            self._spans_of(parts, shape, direct)
            for parts, shape in zip(tensors, self._stored.format.shapes, strict=True)
        ]

    def _spans_of(self, parts: list[Part], expected: tuple[int, ...], direct: bool) -> list[Span]:
        """The spans of parts that make up a tensor, neighbours in one."""
        files = [self._file(part, direct) for part in parts]
        shapes = [file.shape(part) for file, part in zip(files, parts, strict=True)]
        whole = (sum(shape[0] for shape in shapes if shape), *shapes[0][1:])
        if whole != expected or any(shape[1:] != expected[1:] for shape in shapes):
            found = " and ".join(f"{part} has shape {list(shape)}" for part, shape in zip(parts, shapes, strict=True))
            together = " when put together" if len(parts) > 1 else ""
            raise ValueError(f"{files[0].path}: {found}, expected {list(expected)}{together}")
        spans: list[Span] = []
        for file, part in zip(files, parts, strict=True):
            span = file.span(part)
            if spans and (joined := spans[-1].joined(span)) is not None:
                spans[-1] = joined
            else:
                spans.append(span)
        return spans

    def _file(self, part: Part, direct: bool) -> SafetensorsFile:
        files = self._stored.weights.files
        if part.name not in files:
            folder = next(iter(files.values())).parent
            raise ValueError(
                f"{folder} has no weights named {part.name}; its files are incomplete, download them again"
            )
        path = files[part.name]
        if path not in self._files:
            self._files[path] = SafetensorsFile(path, direct)
        return self._files[path]

    def __len__(self) -> int:
        """Number of experts in all layers."""
        return len(self._spans)

    @property
    def reader_bytes(self) -> int:
        """Bytes that each loader thread may allocate: its read buffer, or an expert as stored and as converted."""
        return 2 * self._stored.format.nbytes(torch.float32) if self.converts else self._piece

    def has(self, key: Key) -> bool:
        """Whether the model has this expert: all of them are on disk."""
        return key in self._spans

    def read(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Reads one expert into a buffer, on the calling thread.

        Args:
            key: The expert.
            buffer: A buffer in host memory; its tensors are aligned as in the file.
            stop: Called between pieces; True cancels the read.

        Raises:
            OSError: If the file ends early or cannot be read; the message names it.
            ReadCancelledError: If `stop` returned True.
            ValueError: The same as OSError, of an expert that is converted.
        """
        if not (tensors := self._spans[key]):
            self._read_converted(key, buffer, stop)
            return
        offsets = [spans[0].start % PAGE if spans[0].dtype == self.shape.dtype else 0 for spans in tensors]
        buffer.align(offsets)
        for spans, offset, region, tensor in zip(tensors, offsets, buffer.regions, buffer.tensors, strict=True):
            begin, whole, flat = offset, region.numpy().data, tensor.view(-1)
            for span in spans:
                count = span.size // span.dtype.itemsize
                if span.dtype == self.shape.dtype and begin % PAGE == span.start % PAGE:
                    self._read_pages(span, whole, begin, stop)
                else:
                    first = (begin - offset) // self.shape.dtype.itemsize
                    self._read_cast(span, flat[first : first + count], stop)
                begin += count * self.shape.dtype.itemsize
                if not span.file.direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(span.file.fd, span.start, span.size, os.POSIX_FADV_DONTNEED)

    def _read_converted(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool]) -> None:
        if stop():
            raise ReadCancelledError
        buffer.align([0] * len(buffer.regions))
        for tensor, converted in zip(buffer.tensors, self._stored.read(*key), strict=True):
            tensor.copy_(converted)

    def _read_pages(self, span: Span, region: memoryview, begin: int, stop: Callable[[], bool]) -> None:
        """Reads all pages that a span touches to a byte of a region that is the same byte of a page.

        A span of 10,000 bytes at byte 5,000 of the file touches the pages from 4,096 to 16,384. Read to byte 904 of the
        region, these 12,288 bytes go to its start, where the span then begins at byte 904. What the region held before
        byte 904, the end of the span before, is kept.
        """
        first, done = span.start - span.start % PAGE, 0
        into, before = region[begin - begin % PAGE :], bytes(region[begin - begin % PAGE : begin])
        whole = -(-(span.end - first) // PAGE) * PAGE
        while first + done < span.end:
            count = self._pread(span, into[done : min(done + PIECE, whole)], first + done, stop)
            done += count if first + done + count >= span.end else count - count % PAGE
        into[: len(before)] = before

    def _read_cast(self, span: Span, target: Tensor, stop: Callable[[], bool]) -> None:
        """Reads a span piece by piece into the thread's read buffer and copies each piece into place, cast."""
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
        """Reads at a byte of the file; returns the bytes read: at least a page, or all that is left of the span."""
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
