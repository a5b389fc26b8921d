"""CUDA or CPU: a stopwatch, index uploads and background copies that do not make the host wait for the device."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data.arrays import IntArray


def local_device() -> torch.device:
    """The device of this process: its own CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def upload(index: IntArray, device: torch.device) -> Tensor:
    """An index array as a tensor on a device; for CUDA through pinned memory, so that the host does not wait."""
    tensor: Any = torch.from_numpy(index)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # type: ignore[no-any-return]
    return tensor  # type: ignore[no-any-return]


class Stopwatch:
    """Milliseconds a device was busy with the work issued inside `with stopwatch:`.

    CUDA events measure it on CUDA, the host's clock elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._seconds, self._began = device.type == "cuda", 0.0, 0.0
        self._events: list[Any] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda:
            self._events.append(_event_now())
        else:
            self._began = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cuda:
            self._events.append(_event_now())
        else:
            self._seconds += time.perf_counter() - self._began

    def take_ms(self) -> float:
        """Milliseconds since the last call of this method; waits until the timed work is done."""
        for start, stop in zip(self._events[::2], self._events[1::2], strict=True):
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        taken, self._seconds, self._events = 1e3 * self._seconds, 0.0, []
        return taken


def _event_now() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class BackgroundCopies:
    """Copies that run beside a device's computation: on a CUDA stream of their own, elsewhere on the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device, cuda = device, device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._event: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Copies issued inside run after the computation issued so far, which may still read their targets."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
            self._event.record(self._stream)

    @property
    def finished(self) -> bool:
        """Whether all issued copies are done."""
        return self._event is None or bool(self._event.query())

    def before_later_work(self) -> None:
        """Orders the copies before all computation issued from now on; the host does not wait for them."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
