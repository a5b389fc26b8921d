"""Stopwatch: how long a device was busy, without holding it up: events on CUDA, the clock elsewhere."""

import time
from types import TracebackType
from typing import Any

import torch


class Stopwatch:
    """Adds up spans of work on one device; as a context manager it times what is issued inside."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._seconds, self._began = device.type == "cuda", 0.0, 0.0
        self._events: list[Any] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda:
            self._events.append(_event_now())
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events.append(_event_now())
        else:
            self._seconds += time.perf_counter() - self._began

    def take_ms(self) -> float:
        """Milliseconds since the last take; waits for what was issued."""
        for start, stop in zip(self._events[::2], self._events[1::2], strict=True):
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        taken, self._seconds, self._events = 1e3 * self._seconds, 0.0, []
        return taken


def _event_now() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
