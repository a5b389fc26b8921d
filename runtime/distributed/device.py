"""CUDA or CPU: how a process times its device and copies to and from it without making the host wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from data.arrays import IntArray


def use_device(device: torch.device) -> None:
    """Makes a CUDA device the calling thread's own; a thread that copies without this opens a context on device 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def upload(index: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An index array as a tensor on a device; for CUDA through pinned memory, so that the host does not wait."""
    return to_device(torch.from_numpy(index), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; host memory is pinned before a copy to CUDA, so that the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Download:
    """A copy of a device's tensor to the host that is read later; until then the host does not wait."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = _event_now(timing=False)

    def numpy(self) -> IntArray:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


class Stopwatch:
    """Milliseconds a device was busy with the work issued inside `with stopwatch:`.

    CUDA events measure it on CUDA, the host's clock elsewhere.

    Attributes:
        on: Whether it measures; on CUDA an event costs a launch, and whoever takes the time waits for the device.
    """

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self._cuda, self._seconds, self._began, self.on = device.type == "cuda", 0.0, 0.0, on
        self._events: list[Any] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda and self.on:
            self._events.append(_event_now(timing=True))
        elif self.on:
            self._began = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._cuda and self.on:
            self._events.append(_event_now(timing=True))
        elif self.on:
            self._seconds += time.perf_counter() - self._began

    def restart(self, on: bool) -> None:
        """Forgets what it has measured, and measures from now on or does not."""
        self._seconds, self._events, self.on = 0.0, [], on

    def take_ms(self) -> float:
        """Milliseconds since the last call of this method; waits until the timed work is done."""
        for start, stop in zip(self._events[::2], self._events[1::2], strict=True):
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        taken, self._seconds, self._events = 1e3 * self._seconds, 0.0, []
        return taken


def _event_now(timing: bool) -> Any:
    event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record()
    return event


class BackgroundCopies:
    """Copies that run beside a device's computation: on a CUDA stream of their own, elsewhere on the calling thread.

    The thread that computes calls `computed` and `before_later_work`, on whatever stream it computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, cuda = device, device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._copied: Any = None
        self._computed: Any = None
        self.computed()

    def computed(self) -> None:
        """Notes the computation issued so far, which may still read what later copies overwrite."""
        if self._stream is not None:
            self._computed = _event_now(timing=False)

    @contextmanager
    def issue(self) -> Iterator[None]:
        """Copies issued inside run after the computation that was noted last."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):
            yield
            self._copied = _event_now(timing=False)

    @property
    def finished(self) -> bool:
        """Whether all issued copies are done."""
        return self._copied is None or bool(self._copied.query())

    def before_later_work(self) -> None:
        """Orders the copies, and computation on another stream, before all computation issued from now on."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._computed)
            if self._copied is not None:
                stream.wait_event(self._copied)
            self.computed()

    def wait(self) -> None:
        """Waits until all issued copies are done, before their memory is freed."""
        if self._stream is not None:
            self._stream.synchronize()
