"""What the machine does by itself: how fast its disk is read, how much memory a process holds; and a slower disk."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from runtime.offload.cache import LOADERS
from runtime.offload.expert_files import ExpertFiles, never
from runtime.offload.memory import BufferPool, ExpertBuffer, Key


class ResidentPeak:
    """Most bytes by which the process grew while the block ran; looks every few milliseconds.

    Attributes:
        grown: That many bytes.
    """

    EVERY = 0.005  # seconds

    def __enter__(self) -> "ResidentPeak":
        self.grown, self._start, self._done = 0, resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(self.EVERY):
            self.grown = max(self.grown, resident_bytes() - self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Bytes of memory the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def touch(model: nn.Module) -> None:
    """Brings weights that are only mapped into memory, so that they are not taken for growth later."""
    for parameter in model.parameters():
        parameter.detach().sum()


class ThrottledFiles(ExpertFiles):
    """Reads no faster than a limit over all threads: a stand-in for a slower disk, never used unless asked for."""

    def __init__(self, *args: Any, mbps: float | None = None) -> None:
        super().__init__(*args)
        self._mbps, self._free, self._lock = mbps, 0.0, threading.Lock()

    def read(self, key: Key, place: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """See `ExpertFiles.read`; waits until a disk of that speed would be done."""
        if self._mbps is not None:
            with self._lock:
                self._free = max(self._free, time.perf_counter()) + self.shape.nbytes / self._mbps / 1e6
                until = self._free
        super().read(key, place, stop)
        if self._mbps is not None:
            time.sleep(max(0.0, until - time.perf_counter()))


def read_speed(files: ExpertFiles, count: int = 48) -> dict[str, Any]:
    """How fast experts arrive in memory, from as many threads as a tier has; closes the files."""
    shape, keys = files.shape, sorted(files.keys())
    keys = keys[:: max(len(keys) // count, 1)][:count]
    pool = BufferPool(shape, LOADERS, torch.device("cpu"))

    def read(share: int) -> None:
        for key in keys[share::LOADERS]:
            files.read(key, pool.places[share])

    list(map(read, range(LOADERS)))  # touches the memory
    with ThreadPoolExecutor(LOADERS) as threads:
        began = time.perf_counter()
        list(threads.map(read, range(LOADERS)))
        seconds = time.perf_counter() - began
    direct = files.direct
    files.close()
    return {
        "read_mbps": round(len(keys) * shape.nbytes / seconds / 1e6),
        "expert_ms": round(1e3 * seconds / len(keys), 2),
        "direct": direct,
    }
