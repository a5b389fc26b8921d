"""Pretended streams, events and current devices: what `torch.cuda` offers for them, with vector clocks as results.

Work is done at once on the host, so nothing ever runs late; the clocks tell what a GPU would have been free to reorder.
"""

import itertools
import threading
import time
import weakref
from collections import Counter
from typing import Any

import torch

from tests.helpers.cuda_requests import COUNTS, SYNC, TIMING_EVENT
from tests.helpers.host_order import Clock, host_clock, learn, merged

_numbers = itertools.count(1)
_local = threading.local()
_lock = threading.Lock()
_default: dict[int, "Stream"] = {}
_alive: weakref.WeakSet["Stream"] = weakref.WeakSet()
CONTEXTS: Counter[tuple[int, str]] = Counter()
"""How often each thread made a device current, by (device index, thread name): a GPU then gets a context of its own."""


def device_index(device: Any = None) -> int:
    """Index of a CUDA device given in any way; the current one by default."""
    if device is None or isinstance(device, int):
        return current_device() if device is None else device
    index = torch.device(device).index
    return current_device() if index is None else index


def current_device() -> int:
    """Index of the calling thread's current device; 0 in a new thread, as in CUDA."""
    return int(getattr(_local, "device", 0))


def set_device(device: Any) -> None:
    """Makes a device the calling thread's current one."""
    _local.device = device_index(device)
    CONTEXTS[_local.device, threading.current_thread().name] += 1


class Stream:
    """A queue of a device: its operators run in order.

    Attributes:
        clock: What is done before an operator that is issued now.
    """

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cuda", device_index(device))
        self.number, self.priority, self.clock = next(_numbers), priority, {}
        self.device_index, self.cuda_stream = self.device.index, self.number
        _alive.add(self)

    def issue(self) -> int:
        """Counts one more operator, which comes after everything the calling thread knows to be done."""
        with _lock:
            self.clock = merged(self.clock, host_clock())
            self.clock[self.number] = self.clock.get(self.number, 0) + 1
            return self.clock[self.number]

    def order_after(self, clock: Clock) -> None:
        """Orders later operators after those of a clock."""
        with _lock:
            self.clock = merged(self.clock, clock)

    def wait_event(self, event: "Event") -> None:
        self.order_after(event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self.order_after(stream.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        COUNTS.add(SYNC, "Stream.synchronize")
        learn(self.clock)

    def query(self) -> bool:
        learn(self.clock)
        return True

    def __enter__(self) -> "Stream":
        self._entered = StreamContext(self)
        self._entered.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: Clock = {}
        self._timed, self._at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        if self._timed:
            COUNTS.add(TIMING_EVENT, "Event.record")
        self._at, self.clock = time.perf_counter(), merged(stream.clock, host_clock())

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        learn(self.clock)
        return True

    def synchronize(self) -> None:
        COUNTS.add(SYNC, "Event.synchronize")
        learn(self.clock)

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timed and end._timed) or self._at is None or end._at is None:
            raise RuntimeError("Both events must be recorded, with enable_timing, before calculating elapsed time.")
        return 1e3 * (end._at - self._at)


class StreamContext:
    """`with torch.cuda.stream(stream)`: makes a stream and its device current; None changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is None:
            return
        self._device, index = current_device(), self._stream.device_index
        if self._device != index:
            set_device(index)
        self._before = current_stream()
        _streams()[index] = self._stream

    def __exit__(self, *error: object) -> None:
        if self._stream is None:
            return
        _streams()[self._stream.device_index] = self._before
        if self._device != self._stream.device_index:
            set_device(
                self._device
            )  # as torch does, which makes a context on device 0 from a thread that never set one


class DeviceContext:
    """`with torch.cuda.device(device)`."""

    def __init__(self, device: Any) -> None:
        self._index = device_index(device)

    def __enter__(self) -> None:
        self._before = current_device()
        if self._before != self._index:
            set_device(self._index)

    def __exit__(self, *error: object) -> None:
        _local.device = self._before


def default_stream(device: Any = None) -> Stream:
    """The stream that a device's work goes to unless told otherwise."""
    index = device_index(device)
    with _lock:
        if index not in _default:
            _default[index] = Stream(index)
        return _default[index]


def current_stream(device: Any = None) -> Stream:
    """The stream that the calling thread issues its work to."""
    index = device_index(device)
    stream: Stream = _streams().get(index) or default_stream(index)
    return stream


def set_stream(stream: Stream) -> None:
    """Makes a stream and its device current without a context."""
    set_device(stream.device_index)
    _streams()[stream.device_index] = stream


def synchronize(device: Any = None) -> None:
    """Waits for all streams of a device."""
    COUNTS.add(SYNC, "torch.cuda.synchronize")
    index = device_index(device)
    for stream in list(_alive):
        if stream.device_index == index:
            learn(stream.clock)


def _streams() -> dict[int, Stream]:
    if not hasattr(_local, "streams"):
        _local.streams = {}
    streams: dict[int, Stream] = _local.streams
    return streams


def forget() -> None:
    """Forgets contexts, default streams, and what the calling thread has made current, as in a new process."""
    with _lock:
        _default.clear()
    CONTEXTS.clear()
    vars(_local).clear()
