"""ExpertCache: provides any expert of a model from memory that holds only some of them, evicting and prefetching.

    with ExpertCache.open(stored, layout, torch.float32, device_memory="2GiB") as cache:
        cache.expect(forecast)                        # load of the next batch
        cache.begin()                                 # that batch begins
        for expert, tensors in cache.use(layer, [3, 17]):
            ...

On an accelerator, experts are copied from page-locked host memory, which is filled from disk. On a CPU they are read
from disk into the memory where they are computed; a second tier of host memory below it then saves reads.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from data.arrays import FloatArray
from data.byte_sizes import parse_bytes
from data.models.layout import MoELayout
from data.models.stored_experts import ExpertReader
from predictor.forecast import LoadForecast
from runtime.offload.expert_files import ExpertFiles, never
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import BufferPool, ExpertBuffer, Key, buffers_within
from runtime.offload.policy import Policy
from runtime.offload.tier import LowerTier, Tier

LOADERS = 2
"""Loader threads of each tier. One reads while the other copies; most disks are faster with two reads at once."""


class TierReader:
    """Reads experts from a tier for the tier above it, such as from host memory for an accelerator.

    Args:
        below: The tier to copy from; an expert that it lacks is loaded into it first.
    """

    def __init__(self, below: Tier) -> None:
        self.below, self._thread = below, threading.local()

    def has(self, key: Key) -> bool:
        """Whether the expert is resident in the tier below."""
        return self.below.has(key)

    def read(self, key: Key, buffer: ExpertBuffer, stop: Callable[[], bool] = never) -> None:
        """Copies an expert into a buffer, on a CUDA stream of the calling thread's own; returns when it is done."""
        buffer.align([0] * len(buffer.regions))
        self.below.request([key])
        for source in self.below.acquire([key]):
            if not buffer.storage.is_cuda:
                self._copy(source, buffer)
                continue
            if not hasattr(self._thread, "stream"):
                self._thread.stream = torch.cuda.Stream(buffer.storage.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._thread.stream):
                self._copy(source, buffer)
            self._thread.stream.synchronize()  # the source buffer may be evicted as soon as this loop ends

    @staticmethod
    def _copy(source: ExpertBuffer, target: ExpertBuffer) -> None:
        for ours, theirs in zip(target.tensors, source.tensors, strict=True):
            ours.copy_(theirs, non_blocking=True)


class ExpertCache:
    """The experts of a model within a memory budget for each tier.

    A budget covers expert buffers and the loader threads' read buffers. All of it is allocated when the cache is made.

    Args:
        files: The experts on disk; the cache closes them.
        policy: Decides which experts to keep and which to prefetch.
        device_memory: Bytes on the device that computes.
        host_memory: Bytes of host memory below it; required if the device is an accelerator.
        device: Device on which experts are computed.

    Attributes:
        tiers: The tiers, from the one that computes downwards.
        policy: The policy.

    Raises:
        ValueError: If a budget does not hold one expert, with the smallest one that does, or memory is not available.
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
        device = torch.device(device)
        if device.type != "cpu" and host_memory is None:
            raise ValueError(f"host_memory is not set; experts are copied to {device} through host memory, so set it")
        lower = None if host_memory is None else ("host", host_memory, torch.device("cpu"), device.type == "cuda")
        self.tiers: list[Tier] = []
        try:
            source: LowerTier = files
            for name, budget, where, page_locked in filter(None, [lower, ("device", device_memory, device, False)]):
                reserve = LOADERS * files.reader_bytes if source is files else 0
                count = min(buffers_within(budget, files.shape, reserve, f"{name}_memory"), len(files))
                self.tiers.insert(0, Tier(name, BufferPool(files.shape, count, where, page_locked), source, LOADERS))
                source = TierReader(self.tiers[0])
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        stored: ExpertReader,
        layout: MoELayout,
        dtype: torch.dtype,
        device_memory: int | str,
        host_memory: int | str | None = None,
        device: torch.device | str = "cpu",
    ) -> "ExpertCache":
        """Opens a model's files with the forecast policy, which falls back to LRU where forecasts do not pay.

        Args:
            stored: The experts in the model's files.
            layout: The model's MoE layers.
            dtype: Dtype in which experts are computed.
            device_memory: Bytes on the device that computes, as a number or like '2GiB'.
            host_memory: Bytes of host memory below it, likewise; required if the device is an accelerator.
            device: Device on which experts are computed.

        Raises:
            ValueError: If a file is damaged, or a budget cannot be read or is too small.
        """
        budget, below = parse_bytes(device_memory), None if host_memory is None else parse_bytes(host_memory)
        files = ExpertFiles(stored, layout, dtype)
        shape = (layout.num_layers, layout.num_experts)
        buffers = max(budget // files.shape.padded_bytes, 1)
        return cls(files, LruFallback(ForecastPolicy(*shape), *shape, buffers), budget, below, device)

    def report(self) -> dict[str, Any]:
        """Counters of each tier by its name, the policy's name, and its number of fallbacks to LRU; for JSON."""
        fallbacks = self.policy.fallbacks if isinstance(self.policy, LruFallback) else 0
        return {tier.name: tier.stats.to_json() for tier in self.tiers} | {
            "policy": self.policy.name,
            "fallbacks": fallbacks,
        }

    def __enter__(self) -> "ExpertCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def loads(self) -> int:
        """Experts read from disk so far."""
        return self.tiers[-1].loads

    def begin(self) -> None:
        """Starts a batch, the one that the last `expect` forecast; prefetching turns to its first layers."""
        with self._planning:
            self.policy.begin()
            self._plan()

    def expect(self, forecast: LoadForecast | None) -> None:
        """Sets the forecast of the batch after the current one, from any thread; None means that there is none."""
        with self._planning:
            self.policy.expect(forecast)
            self._plan()

    def foresee(self, layer: int, load_E: FloatArray) -> None:
        """Sets a forecast of what a layer needs when it runs next, in tokens `[E]`; the next `use` or `replan` acts."""
        with self._planning:
            self.policy.foresee(layer, load_E)

    def replan(self) -> None:
        """Has prefetching follow what was foreseen, before a layer runs."""
        with self._planning:
            self._plan()

    def _plan(self) -> None:
        next_use_LE, prefetch_candidates = self.policy.next_use(), self.policy.prefetch_candidates()
        for tier in self.tiers:
            tier.plan(next_use_LE, prefetch_candidates)

    def use(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields the experts that a layer needs now and their tensors, resident ones first.

        Absent experts are loaded while the caller computes. Weights may be used until the next ones are asked for.

        Raises:
            OSError: If an expert cannot be read; the message names the file, and other experts stay usable.
        """
        keys = [(layer, expert) for expert in experts]
        upper = self.tiers[0]
        upper.request(keys)
        with self._planning:
            self.policy.observe(layer, experts, upper.stats.costs)
            self._plan()
        for buffer in upper.acquire(keys):
            assert buffer.key is not None
            yield buffer.key[1], buffer.tensors

    def close(self) -> None:
        """Cancels running loads, ends the loader threads, frees the memory and closes the files."""
        for tier in self.tiers:
            tier.stop()
        while self.tiers:
            self.tiers.pop(0).close()
        self.files.close()
