"""Measures the memory of the process and the read speed of the disk, and simulates a slower disk."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.offload.cache import LOADERS
from runtime.offload.expert_files import ExpertFiles, never
from runtime.offload.memory import BufferPool, ExpertBuffer, Key


class ResidentPeak:
    """Measures by how much the process's memory grows while the block runs, by sampling.

    Attributes:
        grown: Bytes between the start and the peak.
    """

    INTERVAL_S = 0.02
    """Seconds between two samples: at .005 they took 4 % of a core, and the interpreter from the model."""

    def __enter__(self) -> "ResidentPeak":
        self.grown, self._start, self._done = 0, resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self.grown = max(self.grown, resident_bytes() - self._start)

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def resident_bytes() -> int:
    """Bytes of physical memory that the process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_bytes() -> int:
    """Bytes of physical memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def touch(model: nn.Module) -> None:
    """Reads all weights once: memory-mapped pages become resident now and are not counted as growth later."""
    for parameter in model.parameters():
        parameter.detach().sum()


class ThrottledFiles(ExpertFiles):
    """Expert files that can be read no faster than a limit over all threads, as from a slower disk.

    Args:
        args: Arguments of `ExpertFiles`.
        mbps: Limit in MB/s; None reads at full speed.
    """

    def __init__(self, *args: Any, mbps: float | None = None) -> None:
        super().__init__(*args)
        self._mbps, self._free_at, self._lock = mbps, 0.0, threading.Lock()

    @property
    def keys(self) -> list[Key]:
        """All experts of the model, in order."""
        return sorted(self._spans)

    @property
    def direct(self) -> bool:
        """Whether all files are read past the page cache."""
        return all(file.direct for file in self._files.values())

    def read(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Reads an expert, then waits until the slower disk would have finished."""
        if self._mbps is not None:
            with self._lock:
                self._free_at = max(self._free_at, time.perf_counter()) + self.shape.nbytes / self._mbps / 1e6
                until = self._free_at
        super().read(key, buffer, stop)
        if self._mbps is not None:
            time.sleep(max(0.0, until - time.perf_counter()))


def read_speed(files: ThrottledFiles, count: int = 48) -> dict[str, Any]:
    """Measures the read speed with as many threads as a tier has loaders; closes the files.

    Returns:
        MB/s as `read_mbps`, milliseconds per expert as `expert_ms`, and whether reads were `direct`.
    """
    keys = files.keys[:: max(len(files) // count, 1)][:count]
    pool = BufferPool(files.shape, LOADERS, torch.device("cpu"))

    def read(thread: int) -> None:
        for key in keys[thread::LOADERS]:
            files.read(key, pool.buffers[thread])

    list(map(read, range(LOADERS)))  # a first, untimed round
    with ThreadPoolExecutor(LOADERS) as threads:
        began = time.perf_counter()
        list(threads.map(read, range(LOADERS)))
        seconds = time.perf_counter() - began
    direct = files.direct
    files.close()
    return {
        "read_mbps": round(len(keys) * files.shape.nbytes / seconds / 1e6),
        "expert_ms": round(1e3 * seconds / len(keys), 2),
        "direct": direct,
    }
