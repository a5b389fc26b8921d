"""Tier: a place for some of the experts, under a byte budget, filled from the tier below while the model computes.

Glossary: an expert is *wanted* while somebody waits for it or computes with it, and stays; a *load* brings it from the
tier below, on *demand* if somebody waits, else as a *prefetch*. A wanted expert is loaded before any prefetch. What is
due last gives way; a prefetch never evicts what is due sooner than itself, or hardly later.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from data.arrays import FloatArray
from runtime.offload.expert_files import ReadCancelledError, never
from runtime.offload.memory import BufferPool, ExpertBuffer, Key
from runtime.offload.stats import CacheStats

log = logging.getLogger(__name__)


EVICTION_FACTOR, EVICTION_LAYERS = 1.5, 1.0
"""A prefetch evicts only what is due later than this many times its own due, and this many layers.

Without, what is hardly less urgent is moved to and fro by the forecasts' noise: a third more bytes for the same time.
"""


class LowerTier(Protocol):
    """What a tier is filled from."""

    def has(self, key: Key) -> bool:
        """Whether it has the expert at hand, so that a prefetch need not wait for a tier further below."""
        ...

    def read(self, key: Key, place: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Brings an expert into a place, on the calling thread; see `ExpertFiles.read`."""
        ...


@dataclass(frozen=True)
class LoadJob:
    """One expert on its way into a place.

    Attributes:
        key: The expert.
        place: Where it goes.
        ahead: Whether nobody waits for it: a prefetch.
    """

    key: Key
    place: ExpertBuffer
    ahead: bool


class Shelf:
    """Places of a pool by the experts in them.

    Attributes:
        due: Layers run until each expert is needed next, `[L, E]`; None as long as nobody said.
    """

    def __init__(self, pool: BufferPool) -> None:
        self.next_use: FloatArray | None = None
        self._places = pool.places
        self._where: dict[Key, ExpertBuffer] = {}

    def __len__(self) -> int:
        """Experts that are there or on their way."""
        return len(self._where)

    def get(self, key: Key) -> ExpertBuffer | None:
        """Where an expert is or will be."""
        return self._where.get(key)

    def has(self, key: Key) -> bool:
        """Whether an expert is there."""
        place = self._where.get(key)
        return place is not None and place.ready

    def next_use_of(self, key: Key | None) -> float:
        """When an expert is needed next; never for none."""
        if key is None:
            return float(np.inf)
        return 0.0 if self.next_use is None else float(self.next_use[key])

    def victim(self, wanted: Container[Key]) -> ExpertBuffer | None:
        """An empty place, or the one whose expert is due last of those that nobody wants; None if there is none."""
        best, latest = None, -np.inf
        for place in self._places:
            if place.key is None:
                return place
            if place.ready and place.key not in wanted and (due := self.next_use_of(place.key)) >= latest:
                best, latest = place, due
        return best

    def assign(self, place: ExpertBuffer, key: Key) -> None:
        """Gives an empty place to an expert on its way."""
        assert place.key is None, f"{place.key} is still there"
        place.key, self._where[key] = key, place

    def clear(self, place: ExpertBuffer) -> None:
        """Empties a place."""
        if place.key is not None:
            del self._where[place.key]
        place.key, place.ready, place.idle = None, False, False


class Tier:
    """Holds experts in the places of a pool; threads of its own load them.

    Args:
        name: What errors and thread names call it.
        pool: The memory; the tier releases it when closed.
        source: The tier below.
        loaders: Threads that load; from most disks two get more than one.
    """

    def __init__(self, name: str, pool: BufferPool, source: LowerTier, loaders: int = 2) -> None:
        self.name, self.pool, self.source, self.stats = name, pool, source, CacheStats()
        self._shelf = Shelf(pool)
        self._pinned: Counter[Key] = Counter()
        self._demands: deque[Key] = deque()
        self._candidates: list[Key] = []
        self._candidate_keys: set[Key] = set()
        self._failed: dict[Key, Exception] = {}
        self._complained: set[Key] = set()
        self._loading, self._busy_since, self._closing = 0, 0.0, False
        self._change = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"switchcast-{name}-{index}", daemon=True)
            for index in range(loaders)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def loads(self) -> int:
        """Loads so far."""
        return self.stats.demands + self.stats.prefetches

    def has(self, key: Key) -> bool:
        """Whether the expert is there."""
        return self._shelf.has(key)

    def plan(self, next_use_LE: FloatArray, prefetch_candidates: Sequence[Key]) -> None:
        """From now on evicts the largest next use, `[L, E]`, and fetches candidates; earlier ones are off."""
        with self._change:
            self._shelf.next_use = next_use_LE.copy()
            self._candidates, self._candidate_keys = list(prefetch_candidates), set(prefetch_candidates)
            self._change.notify_all()

    def request(self, keys: Sequence[Key]) -> None:
        """Asks for experts, which stay from when they are there until `take` has handed them out."""
        with self._change:
            for key in keys:
                self._pinned[key] += 1
                place = self._shelf.get(key)
                if place is None:
                    self.stats.misses += 1
                    self._demands.append(key)
                elif place.ready:
                    self.stats.hits += 1
                else:
                    self.stats.late += 1
            self._change.notify_all()

    def acquire(self, keys: Sequence[Key]) -> Iterator[ExpertBuffer]:
        """Hands out experts asked for with `want`: what is there first, the others as they arrive.

        A place is the caller's until it asks for the next one.

        Raises:
            OSError: If one could not be loaded; what is resident stays usable.
        """
        waiting = list(keys)
        try:
            while waiting:
                place = self._next(waiting)
                assert place.key is not None
                yield place
                if place.wi.is_cuda:
                    place.read = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    place.read.record(torch.cuda.current_stream(place.wi.device))
                waiting.remove(place.key)
                self._release([place.key])
        finally:
            self._release(waiting)

    def _next(self, waiting: list[Key]) -> ExpertBuffer:
        """The first of these experts that is there."""
        with self._change:
            began = time.perf_counter()
            while not (there := [key for key in waiting if self.has(key)]):
                if self._closing:
                    raise RuntimeError(f"the {self.name} tier was closed while experts were waited for")
                if failed := [key for key in waiting if key in self._failed]:
                    raise self._failed[failed[0]]
                self._change.wait()
            self.stats.stall_ms += 1e3 * (time.perf_counter() - began)
            place = self._shelf.get(there[0])
            assert place is not None
            if place.idle:
                place.idle = False
                self.stats.useful_prefetches += 1
            return place

    def _release(self, keys: Sequence[Key]) -> None:
        with self._change:
            for key in keys:
                self._pinned[key] -= 1
                if not self._pinned[key]:
                    del self._pinned[key]
                    self._failed.pop(key, None)
            self._change.notify_all()

    def _work(self) -> None:
        """What a loading thread does until the tier is closed."""
        while (load := self._take_up()) is not None:
            error: Exception | None = None
            try:
                if load.place.read is not None:
                    load.place.read.synchronize()  # the kernels that used the evicted expert
                    load.place.read = None
                self.source.read(load.key, load.place, partial(self._is_stale, load))
            except Exception as caught:
                error = caught
            self._finish(load, error)

    def _is_stale(self, load: LoadJob) -> bool:
        """Whether a load is to be given up: nobody hopes for it any more, and somebody waits for another."""
        return self._closing or bool(
            load.ahead and self._demands and load.key not in self._pinned and load.key not in self._candidate_keys
        )

    def _take_up(self) -> LoadJob | None:
        """Waits for something to load and claims a place for it; None when the tier is closed."""
        with self._change:
            while not self._closing:
                load = self._choose()
                if load is not None:
                    self._clear(load.place)
                    self._shelf.assign(load.place, load.key)
                    self.stats.peak_bytes = max(self.stats.peak_bytes, 2 * self.pool.shape.room * len(self._shelf))
                    if not self._loading:
                        self._busy_since = time.perf_counter()
                    self._loading += 1
                    return load
                self._change.wait()
        return None

    def _choose(self) -> LoadJob | None:
        """The next load, wanted experts first; None if there is none, or no place for it yet."""
        while self._demands and (self._demands[0] not in self._pinned or self._shelf.get(self._demands[0])):
            self._demands.popleft()
        if not self._demands and not self._candidates:
            return None
        victim = self._shelf.victim(self._pinned)
        if victim is None:
            return None
        if self._demands:
            return LoadJob(self._demands.popleft(), victim, ahead=False)
        latest = self._shelf.next_use_of(victim.key)
        while self._candidates:
            key = self._candidates.pop(0)
            if (
                not self._shelf.get(key)
                and EVICTION_FACTOR * self._shelf.next_use_of(key) + EVICTION_LAYERS < latest
                and self.source.has(key)
            ):
                return LoadJob(key, victim, ahead=True)
        return None

    def _clear(self, place: ExpertBuffer) -> None:
        self.stats.wasted_prefetches += place.idle
        self._shelf.clear(place)

    def _finish(self, load: LoadJob, error: Exception | None) -> None:
        with self._change:
            now = time.perf_counter()
            self.stats.load_ms += 1e3 * (now - self._busy_since)
            self._busy_since, self._loading = now, self._loading - 1
            if error is None:
                load.place.ready, load.place.idle = True, load.ahead
                self._count(load)
            else:
                self._clear(load.place)
                self._explain(load, error)
            self._change.notify_all()

    def _count(self, load: LoadJob) -> None:
        if load.ahead:
            self.stats.prefetches += 1
            self.stats.prefetch_bytes += self.pool.shape.nbytes
        else:
            self.stats.demands += 1
            self.stats.demand_bytes += self.pool.shape.nbytes

    def _explain(self, load: LoadJob, error: Exception) -> None:
        """What becomes of a load that did not succeed: whoever waits hears of it, for a prefetch the log does."""
        if isinstance(error, ReadCancelledError):
            self.stats.cancelled += 1
            if load.key in self._pinned:  # asked for just after it was given up
                self._demands.append(load.key)
            return
        self.stats.failed += 1
        if load.key in self._pinned:
            self._failed[load.key] = error
        elif load.key not in self._complained:
            self._complained.add(load.key)
            log.warning("expert %s could not be fetched ahead: %s", load.key, error)

    def stop(self) -> None:
        """Gives up what is being loaded; whoever waits is told."""
        with self._change:
            self._closing = True
            self._change.notify_all()

    def close(self) -> None:
        """Waits for the loading threads to end and frees the memory."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self.pool.release()
        self._shelf = Shelf(self.pool)
