"""ExpertCache: gives out any expert of a model from memory that holds a part of them, tier upon tier.

On an accelerator experts come from its own memory, below which lies page-locked host memory, below which disk. Without
one they come from host memory under the first budget; a second tier in host memory then saves reads as well.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from data.models.layout import MoELayout
from predictor.forecast import LoadForecast
from runtime.offload.expert_files import ExpertFiles, never
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import BufferPool, ExpertBuffer, Key, parse_bytes, places_within
from runtime.offload.policy import Policy
from runtime.offload.tier import LowerTier, Tier

log = logging.getLogger(__name__)
LOADERS = 2
"""Threads that load into each tier: while one copies, the other reads."""


class FromTier:
    """A tier as the source of the one above it: host memory below an accelerator's.

    Args:
        below: The tier to copy from; what it lacks it fetches.
    """

    def __init__(self, below: Tier) -> None:
        self.below, self._own = below, threading.local()

    def has(self, key: Key) -> bool:
        """See `Source`."""
        return self.below.has(key)

    def read(self, key: Key, place: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """See `Source`; returns when the copy is done, on a stream of the calling thread's own where there are any."""
        place.align(0, 0)
        self.below.request([key])
        for source in self.below.acquire([key]):
            if not place.wi.is_cuda:
                place.wi.copy_(source.wi)
                place.wo.copy_(source.wo)
                continue
            if not hasattr(self._own, "stream"):
                self._own.stream = torch.cuda.Stream(place.wi.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._own.stream):
                place.wi.copy_(source.wi, non_blocking=True)
                place.wo.copy_(source.wo, non_blocking=True)
            self._own.stream.synchronize()  # this thread alone waits; the place below may be evicted from here on


class ExpertCache:
    """Experts under a byte budget for each tier.

    The budgets hold the experts and the buffers they are read through; all of it is allocated here, once.

    Args:
        files: Where experts are read from; the cache closes them.
        policy: Says what to keep and what to fetch.
        device_memory: Bytes on the device that computes.
        host_memory: Bytes of host memory below it; an accelerator needs some.
        device: Where experts are computed.

    Attributes:
        tiers: From the one that computes down.
        policy: As given.

    Raises:
        ValueError: If a budget cannot hold what one token needs; the message has the smallest that can.
    """

    def __init__(
        self,
        files: ExpertFiles,
        policy: Policy,
        device_memory: int,
        host_memory: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.files, self.policy, self._planning = files, policy, threading.Lock()
        place = torch.device(device)
        if place.type != "cpu" and host_memory is None:
            raise ValueError(f"experts reach {place} through host memory; give host_memory as well")
        lower = None if host_memory is None else ("host", host_memory, torch.device("cpu"), place.type == "cuda")
        self.tiers: list[Tier] = []
        try:
            source: LowerTier = files
            for name, budget, where, pinned in filter(None, [lower, ("device", device_memory, place, False)]):
                reserve = LOADERS * files.reader_bytes if source is files else 0
                places = min(places_within(budget, files.shape, reserve, f"{name}_memory"), len(files))
                self.tiers.insert(0, Tier(name, BufferPool(files.shape, places, where, pinned), source, LOADERS))
                source = FromTier(self.tiers[0])
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        files: Mapping[str, Path],
        layout: MoELayout,
        dtype: torch.dtype,
        device_memory: int | str,
        host_memory: int | str | None = None,
        device: torch.device | str = "cpu",
    ) -> "ExpertCache":
        """A cache that keeps and fetches by forecasts, and gives way to least-recently-used where they do not pay.

        Args:
            files: The file that holds each tensor; see `data.models.weights.ModelWeights`.
            layout: The model's MoE layers.
            dtype: What experts are computed in.
            device_memory: See the class; also as '2GiB'.
            host_memory: Likewise.
            device: Where experts are computed.

        Raises:
            ValueError: If a file is damaged, or a budget is none or too small.
        """
        budget, below = parse_bytes(device_memory), None if host_memory is None else parse_bytes(host_memory)
        stored = ExpertFiles(files, layout, dtype)
        shape = (layout.num_layers, layout.num_experts)
        policy = LruFallback(ForecastPolicy(*shape), *shape, places=max(budget // (2 * stored.shape.room), 1))
        return cls(stored, policy, budget, below, device)

    def report(self) -> dict[str, Any]:
        """What each tier did, by its name, and how often forecasts gave way; for JSON."""
        fallbacks = self.policy.fallbacks if isinstance(self.policy, LruFallback) else 0
        return {tier.name: tier.stats.to_json() for tier in self.tiers} | {
            "policy": self.policy.name,
            "fallbacks": fallbacks,
        }

    def __enter__(self) -> "ExpertCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def loads(self) -> int:
        """Experts read from disk so far."""
        return self.tiers[-1].loads

    def begin(self) -> None:
        """A batch begins, the one that `expect` spoke of; its first layers are fetched from here on."""
        with self._planning:
            self.policy.begin()
            self._plan()

    def expect(self, forecast: LoadForecast | None) -> None:
        """The forecast of the batch after the one under way, from any thread; None if there is none."""
        with self._planning:
            self.policy.expect(forecast)
            self._plan()

    def _plan(self) -> None:
        next_use_LE, prefetch_candidates = self.policy.next_use(), self.policy.prefetch_candidates()
        for tier in self.tiers:
            tier.plan(next_use_LE, prefetch_candidates)

    def use(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Gives the experts a layer needs now, `(expert, wi [F, D], wo [D, F])`, those at hand first.

        Weights are the caller's until it asks for the next ones. Experts not at hand are on their way meanwhile.

        Raises:
            OSError: If one cannot be read; the message names the file, and the others stay usable.
        """
        keys = [(layer, expert) for expert in experts]
        upper = self.tiers[0]
        upper.request(keys)
        with self._planning:
            self.policy.observe(layer, experts, upper.stats.costs)
            self._plan()
        for place in upper.acquire(keys):
            assert place.key is not None
            yield place.key[1], place.wi, place.wo

    def close(self) -> None:
        """Ends the loading threads, giving up what they are at, frees the memory and closes the files."""
        for tier in self.tiers:
            tier.stop()
        while self.tiers:
            self.tiers.pop(0).close()
        self.files.close()
