"""HostClocks: what each host thread knows to be done on the device, and what it learns from other threads.

A clock maps a stream's number to the number of its operators that are known to be done. A thread learns by waiting for
a stream or an event, and from a thread that released a lock before it: `ordered_threads` follows locks, conditions,
queues, futures and the start of threads that are made inside it.
"""

import queue
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

Clock = dict[int, int]
_local = threading.local()


def merged(first: Clock, second: Clock) -> Clock:
    """What is known to be done by either of two clocks."""
    return {key: max(first.get(key, 0), second.get(key, 0)) for key in first.keys() | second.keys()}


def host_clock() -> Clock:
    """What the calling thread knows to be done."""
    clock: Clock = getattr(_local, "clock", {})
    return clock


def learn(clock: Clock) -> None:
    """Adds to what the calling thread knows."""
    _local.clock = merged(host_clock(), clock)


class _OrderedLock:
    """A lock whose holder learns what earlier holders knew when they released it."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._clock = lock, {}

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        taken: bool = self._lock.acquire(*args, **kwargs)
        if taken:
            learn(self._clock)
        return taken

    def release(self) -> None:
        self._clock = merged(self._clock, host_clock())
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class _OrderedRLock(_OrderedLock):
    """The same with the methods that `threading.Condition` asks a reentrant lock for."""

    def _release_save(self) -> Any:
        self._clock = merged(self._clock, host_clock())
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)
        learn(self._clock)

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())


@contextmanager
def ordered_threads(in_each_thread: Callable[[], Any]) -> Iterator[None]:
    """Follows the order between threads, and runs each thread that is started inside within a context manager.

    Args:
        in_each_thread: Makes that context manager, on the new thread.
    """
    lock, rlock, start = threading.Lock, threading.RLock, threading.Thread.start
    c_queue = queue.SimpleQueue

    def ordered_lock() -> _OrderedLock:
        return _OrderedLock(lock())

    def ordered_rlock() -> _OrderedRLock:
        return _OrderedRLock(rlock())

    def ordered_start(thread: threading.Thread) -> None:
        known, run = host_clock(), thread.run

        def run_in_context() -> None:
            learn(known)
            with in_each_thread():
                run()

        thread.run = run_in_context
        start(thread)

    users = [module for module in list(sys.modules.values()) if _uses(module, c_queue)]
    with (
        mock.patch.object(threading, "Lock", ordered_lock),
        mock.patch.object(threading, "RLock", ordered_rlock),
        mock.patch.object(threading.Thread, "start", ordered_start),
    ):
        for module in users:  # a queue in C has no lock that can be followed
            module.SimpleQueue = queue._PySimpleQueue
        try:
            yield
        finally:
            for module in users:
                module.SimpleQueue = c_queue


def _uses(module: Any, c_queue: type) -> bool:
    return isinstance(module, types.ModuleType) and vars(module).get("SimpleQueue") is c_queue
