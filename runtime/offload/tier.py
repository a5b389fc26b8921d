"""Tier: a fixed number of expert buffers, filled from the tier below by loader threads while the model computes.

Glossary:
- A caller *requests* experts and then *acquires* them one by one.
- An expert is *pinned* while a caller waits for it or computes with it; pinned experts are not evicted.
- A *demand load* brings a requested expert, a *prefetch* a candidate of the policy. Demand loads go first; a prefetch
  rests while one runs, because two reads at once share the bandwidth of most disks.
- *Next use* is the number of MoE layers that will run until an expert is expected to be needed again. The resident
  expert with the largest next use is evicted. A prefetch may evict an expert only if that expert's next use is clearly
  later than its own (by the eviction margin).
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from data.arrays import FloatArray
from runtime.distributed.device import use_device
from runtime.offload.buffer_table import BufferTable
from runtime.offload.expert_files import ReadCancelledError, never
from runtime.offload.memory import BufferPool, ExpertBuffer, Key
from runtime.offload.stats import CacheStats

log = logging.getLogger(__name__)

EVICTION_FACTOR, EVICTION_LAYERS = 1.5, 1.0
"""Eviction margin, a ratio and a number of MoE layers: a prefetch whose next use is `n` layers away may only evict an
expert whose next use is more than `EVICTION_FACTOR * n + EVICTION_LAYERS` layers away.

Without a margin, experts of almost equal next use replace each other whenever forecasts change a little: a third more
bytes were read in the same time.
"""


class LowerTier(Protocol):
    """The memory that a tier is filled from: the tier below it, or the model's files."""

    def has(self, key: Key) -> bool:
        """Whether the expert is resident there; a prefetch does not wait for a tier further below."""
        ...

    def read(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Copies an expert into a buffer, on the calling thread; raises `ReadCancelledError` if `stop` returns True."""
        ...


@dataclass(frozen=True)
class LoadJob:
    """One expert on its way into a buffer.

    Attributes:
        key: The expert.
        buffer: The buffer it is loaded into.
        prefetch: Whether it is a prefetch; else a caller waits for it.
    """

    key: Key
    buffer: ExpertBuffer
    prefetch: bool


class Tier:
    """Keeps experts in the buffers of a pool; its loader threads fill them.

    Args:
        name: Name in errors, reports and thread names: 'device' or 'host'.
        pool: The buffers; the tier releases them when it is closed.
        source: The tier below, or the files.
        loaders: Number of loader threads.
    """

    def __init__(self, name: str, pool: BufferPool, source: LowerTier, loaders: int = 2) -> None:
        self.name, self.pool, self.source, self.stats = name, pool, source, CacheStats()
        self._table = BufferTable(pool)
        self._pinned: Counter[Key] = Counter()
        self._demands: deque[Key] = deque()
        self._candidates: list[Key] = []
        self._candidate_keys: set[Key] = set()
        self._failed: dict[Key, Exception] = {}
        self._logged_failures: set[Key] = set()
        self._running: list[LoadJob] = []
        self._running_since, self._closing = 0.0, False
        self._change = threading.Condition()
        self._threads = [
            threading.Thread(target=self._load_until_closed, name=f"switchcast-{name}-{index}", daemon=True)
            for index in range(loaders)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def loads(self) -> int:
        """Loads that finished so far."""
        return self.stats.demands + self.stats.prefetches

    def has(self, key: Key) -> bool:
        """Whether the expert is resident."""
        return self._table.has(key)

    def plan(self, next_use_LE: FloatArray, prefetch_candidates: Sequence[Key]) -> None:
        """Replaces the next uses `[L, E]` that decide eviction, and the experts to prefetch, most urgent first."""
        with self._change:
            self._table.next_use_LE, self._candidate_keys = next_use_LE.tolist(), set(prefetch_candidates)
            farthest = self._table.farthest
            self._candidates = [key for key in prefetch_candidates if self._worthwhile(key, farthest)]
            if self._candidates or self._demands:
                self._change.notify_all()

    def _worthwhile(self, key: Key, victim_next_use: float) -> bool:
        """Whether to prefetch an expert in place of one with a later next use."""
        return (
            EVICTION_FACTOR * self._table.next_use(key) + EVICTION_LAYERS < victim_next_use
            and self._table.get(key) is None
        )

    def request(self, keys: Sequence[Key]) -> None:
        """Pins experts and queues demand loads for those that are absent; `acquire` must follow for the same keys."""
        with self._change:
            for key in keys:
                self._pinned[key] += 1
                buffer = self._table.get(key)
                if buffer is None:
                    self.stats.misses += 1
                    self._demands.append(key)
                elif buffer.ready:
                    self.stats.hits += 1
                else:
                    self.stats.late += 1
            self._change.notify_all()

    def acquire(self, keys: Sequence[Key]) -> Iterator[ExpertBuffer]:
        """Yields the buffers of requested experts: resident ones first, the others as they arrive.

        A buffer may be used until the next one is asked for; its expert is unpinned then.

        Raises:
            OSError: If an expert could not be loaded; resident experts stay usable.
            RuntimeError: If the tier is closed meanwhile.
        """
        waiting = list(keys)
        try:
            while waiting:
                buffer = self._wait_for_any(waiting)
                assert buffer.key is not None
                yield buffer
                if buffer.storage.is_cuda:
                    buffer.last_read = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    buffer.last_read.record(torch.cuda.current_stream(buffer.storage.device))
                waiting.remove(buffer.key)
                self._unpin([buffer.key])
        finally:
            self._unpin(waiting)

    def _wait_for_any(self, waiting: list[Key]) -> ExpertBuffer:
        """Waits until one of these experts is resident and returns its buffer."""
        with self._change:
            began = time.perf_counter()
            while not (resident := [key for key in waiting if self.has(key)]):
                if self._closing:
                    raise RuntimeError(f"the {self.name} tier was closed while a caller waited for experts")
                if failed := [key for key in waiting if key in self._failed]:
                    raise self._failed[failed[0]]
                self._change.wait()
            self.stats.stall_ms += 1e3 * (time.perf_counter() - began)
            buffer = self._table.get(resident[0])
            assert buffer is not None
            if buffer.unused:
                buffer.unused = False
                self.stats.useful_prefetches += 1
            return buffer

    def _unpin(self, keys: Sequence[Key]) -> None:
        with self._change:
            for key in keys:
                self._pinned[key] -= 1
                if not self._pinned[key]:
                    del self._pinned[key]
                    self._failed.pop(key, None)
            self._change.notify_all()

    def _load_until_closed(self) -> None:
        """Body of a loader thread."""
        use_device(self.pool.buffers[0].storage.device)
        while (job := self._next_job()) is not None:
            error: Exception | None = None
            try:
                if job.buffer.last_read is not None:
                    job.buffer.last_read.synchronize()  # kernels may still read the evicted expert
                    job.buffer.last_read = None
                self.source.read(job.key, job.buffer, partial(self._cancelled, job))
            except Exception as caught:
                error = caught
            self._finish(job, error)

    def _cancelled(self, job: LoadJob) -> bool:
        """Whether to cancel a load, which the loader asks between two pieces; a prefetch rests there for demand loads.

        A prefetch is cancelled if its expert is no longer a candidate and a demand load is waiting, unless the expert
        has been requested meanwhile. Closing the tier cancels every load.
        """
        with self._change:
            while not self._closing and not self._awaited(job):
                if self._demands and job.key not in self._candidate_keys:
                    return True
                if not any(map(self._awaited, self._running)):
                    return False
                self._change.wait()
            return self._closing

    def _awaited(self, job: LoadJob) -> bool:
        """Whether a caller waits for a load: a demand load, or a prefetch that was requested meanwhile."""
        return not job.prefetch or job.key in self._pinned

    def _next_job(self) -> LoadJob | None:
        """Waits for an expert to load and claims a buffer for it; None when the tier is closed."""
        with self._change:
            while not self._closing:
                job = self._choose()
                if job is not None:
                    self._evict(job.buffer)
                    self._table.assign(job.buffer, job.key)
                    in_use = self.pool.shape.padded_bytes * len(self._table)
                    self.stats.peak_bytes = max(self.stats.peak_bytes, in_use)
                    if not self._running:
                        self._running_since = time.perf_counter()
                    self._running.append(job)
                    return job
                self._change.wait()
        return None

    def _choose(self) -> LoadJob | None:
        """The next load, demand loads first; None if there is nothing to load, or no buffer for it yet."""
        while self._demands and (self._demands[0] not in self._pinned or self._table.get(self._demands[0])):
            self._demands.popleft()
        if not self._demands and not self._candidates:
            return None
        victim = self._table.victim(self._pinned)
        if victim is None:
            return None
        if self._demands:
            return LoadJob(self._demands.popleft(), victim, prefetch=False)
        victim_next_use = self._table.next_use(victim.key)
        while self._candidates:
            key = self._candidates.pop(0)
            if self._worthwhile(key, victim_next_use) and self.source.has(key):
                return LoadJob(key, victim, prefetch=True)
        return None

    def _evict(self, buffer: ExpertBuffer) -> None:
        self.stats.wasted_prefetches += buffer.unused
        self._table.clear(buffer)

    def _finish(self, job: LoadJob, error: Exception | None) -> None:
        with self._change:
            now = time.perf_counter()
            self.stats.load_ms += 1e3 * (now - self._running_since)
            self._running_since = now
            self._running.remove(job)
            if error is None:
                job.buffer.ready, job.buffer.unused = True, job.prefetch
                self._count(job)
            else:
                self._evict(job.buffer)
                self._handle_failure(job, error)
            self._change.notify_all()

    def _count(self, job: LoadJob) -> None:
        if job.prefetch:
            self.stats.prefetches += 1
            self.stats.prefetch_bytes += self.pool.shape.nbytes
        else:
            self.stats.demands += 1
            self.stats.demand_bytes += self.pool.shape.nbytes

    def _handle_failure(self, job: LoadJob, error: Exception) -> None:
        """Passes the error of a load on to waiting callers; if no caller waits, logs it once for each expert."""
        if isinstance(error, ReadCancelledError):
            self.stats.cancelled += 1
            if job.key in self._pinned:  # requested just after it was cancelled
                self._demands.append(job.key)
            return
        self.stats.failed += 1
        if job.key in self._pinned:
            self._failed[job.key] = error
        elif job.key not in self._logged_failures:
            self._logged_failures.add(job.key)
            layer, expert = job.key
            log.warning("prefetch of expert %d of MoE layer %d failed: %s", expert, layer, error)

    def stop(self) -> None:
        """Cancels running loads; callers that wait for experts get a `RuntimeError`."""
        with self._change:
            self._closing = True
            self._change.notify_all()

    def close(self) -> None:
        """Waits for the loader threads to end and frees the memory."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self.pool.release()
        self._table = BufferTable(self.pool)
