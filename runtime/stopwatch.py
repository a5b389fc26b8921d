"""Stopwatch: how long a device was busy, without holding it up: events on CUDA, the clock elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up spans of work on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._seconds = device.type == "cuda", 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what is issued inside."""
        if self._cuda:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take_ms(self) -> float:
        """Milliseconds since the last take; waits for what was issued."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        taken, self._seconds, self._events = 1e3 * self._seconds, 0.0, []
        return taken
