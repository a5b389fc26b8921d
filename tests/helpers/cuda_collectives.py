"""Collectives of pretended tensors: counted, and ordered as NCCL orders them, on a stream of each group's own."""

import threading
from collections.abc import Callable
from typing import Any

from tests.helpers.collectives import Collective
from tests.helpers.cuda_requests import COLLECTIVE, COUNTS
from tests.helpers.cuda_streams import Event, Stream, StreamContext, current_stream

_streams: dict[tuple[int, int], Stream] = {}
_lock = threading.Lock()


class PendingWork:
    """What an asynchronous collective returns: `wait` orders the current stream after it; the host does not wait."""

    def __init__(self, work: Any, done: Event, device: int) -> None:
        self._work, self._done, self._device = work, done, device

    def wait(self, *args: Any) -> bool:
        self._work.wait(*args)
        current_stream(self._device).wait_event(self._done)
        return True

    def is_completed(self) -> bool:
        return self._done.query()


def on_collective_stream(call: Collective, run: Callable[[], Any]) -> Any:
    """Makes a collective of `CudaTensor`s on its group's stream, after what the current stream has been given."""
    if not call.on_cuda:
        return run()
    COUNTS.add(COLLECTIVE, call.operation)
    device = next(tensor for tensor in call.tensors if tensor.is_cuda).device.index
    with _lock:
        stream = _streams.setdefault((id(call.group), device), Stream(device))
    caller = current_stream(device)
    stream.wait_stream(caller)
    with StreamContext(stream):
        work = run()
    done = stream.record_event()
    if isinstance(work, list):
        return [PendingWork(each, done, device) for each in work]
    if work is not None:
        return PendingWork(work, done, device)
    caller.wait_event(done)
    return None
