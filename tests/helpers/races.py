"""finding_races: finds accesses of one memory that a GPU would be free to reorder, without a GPU.

    with pretending(), finding_races() as found:
        ...
    assert not found.races, found

An access reads or writes a byte range of a storage, on the current stream of the calling thread. Two accesses of
overlapping ranges on different streams, one of which writes, race unless something orders them: events, waits of
streams, or waits of the host. The host races with copies that it has not waited for. What it cannot see: host memory
that is used through numpy after `Tensor.numpy` was called, and memory that an allocator gives away too early.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers import cuda_rules
from tests.helpers.cuda_requests import call_site
from tests.helpers.cuda_streams import current_stream
from tests.helpers.cuda_tensor import OBSERVERS, CudaTensor, Operator, is_pinned
from tests.helpers.host_order import Clock, host_clock, learn


@dataclass(frozen=True)
class Access:
    """A read or write of bytes `start` to `stop` by an operator: the `tick`th on a stream."""

    start: int
    stop: int
    writes: bool
    stream: int
    tick: int
    operator: str
    site: str

    def conflicts(self, other: "Access") -> bool:
        """Whether the order of the two matters."""
        overlap = self.start < other.stop and other.start < self.stop
        return overlap and (self.writes or other.writes) and self.stream != other.stream

    def replaces(self, other: "Access") -> bool:
        """Whether whatever races with the other access races with this later one as well."""
        covers = self.start <= other.start and other.stop <= self.stop
        return covers and self.stream == other.stream and (self.writes or not other.writes)

    def __str__(self) -> str:
        return f"{self.operator} {'writes' if self.writes else 'reads'} at {self.site}"


HOST = 0
"""Number of the host among the streams."""


class RaceFinder:
    """Keeps the accesses of every storage and compares each new one with them.

    Attributes:
        races: How often two accesses raced, by (later one, earlier one), as text.
    """

    def __init__(self) -> None:
        self.races: Counter[tuple[str, str]] = Counter()
        self._accesses: dict[int, list[Access]] = defaultdict(list)
        self._storages: dict[int, Any] = {}  # kept, so that no address is used twice
        self._lock = threading.Lock()

    def __str__(self) -> str:
        rows = [f"{number} times: {one}; {other}, in no order" for (one, other), number in self.races.items()]
        return "\n".join(rows) or "no races"

    def saw(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Takes note of an operator that has run."""
        name = func._schema.name.split("::")[1]
        if name in cuda_rules.VIEWS or func.namespace == "prim":
            return
        on_cuda = next((leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, CudaTensor)), None)
        touched = list(_touched(func, name, args, kwargs, output))
        if on_cuda is None:
            for tensor, writes in touched:
                self.host_access(tensor, writes, name)
            return
        stream = current_stream(on_cuda.device)
        tick = stream.issue()
        clock = dict(stream.clock)
        for tensor, writes in touched:
            if tensor.is_cuda or is_pinned(tensor):
                self._add(_data(tensor), writes, stream.number, tick, name, clock)
        if _host_waits(name, args, kwargs, output):
            learn(clock)

    def host_access(self, tensor: Tensor, writes: bool, name: str) -> None:
        """Takes note of an access by the host."""
        if tensor.untyped_storage().data_ptr() in self._accesses:
            self._add(tensor, writes, HOST, 0, f"{name} on the host", host_clock())

    def _add(self, data: Tensor, writes: bool, stream: int, tick: int, name: str, clock: Clock) -> None:
        if not data.numel():
            return
        storage, start = data.untyped_storage(), data.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
        new = Access(start, start + (last + 1) * data.element_size(), writes, stream, tick, name, call_site())
        with self._lock:
            known = self._accesses[storage.data_ptr()]
            self._storages[storage.data_ptr()] = storage
            for other in known:
                if other.conflicts(new) and clock.get(other.stream, 0) < other.tick:
                    self.races[str(new), str(other)] += 1
            if stream != HOST:
                known[:] = [other for other in known if not new.replaces(other)] + [new]


def _data(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor


def _touched(
    func: Operator, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that an operator reads or writes, and whether it writes them."""
    if name == "_grouped_mm":
        yield from _touched_by_grouped_mm(args, kwargs, output)
        return
    arguments = [*zip(func._schema.arguments, args, strict=False)]
    arguments += [(each, kwargs[each.name]) for each in func._schema.arguments if each.name in kwargs]
    given = set()
    for position, (argument, value) in enumerate(arguments):
        writes = bool(argument.alias_info and argument.alias_info.is_write)
        if func.namespace == "c10d":  # their schemas do not say; the target comes first
            writes = position == 0 and not name.startswith("send")
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                given.add(id(tensor))
                yield tensor, writes
    yield from ((leaf, True) for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and id(leaf) not in given)


def _touched_by_grouped_mm(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Iterator[tuple[Tensor, bool]]:
    """Only the weights of groups that have rows are read."""
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    yield args[0], False
    yield output, True
    if ends is None:
        yield args[1], False
        return
    yield ends, False
    for group, (start, stop) in enumerate(pairwise([0, *map(int, _data(ends))])):
        if stop > start:
            yield CudaTensor(_data(args[1])[group], args[1].device.index), False


def _host_waits(name: str, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether the host continues only when the operator is done."""
    if name in cuda_rules.SYNCING:
        return True
    if name not in ("_to_copy", "copy_"):
        return False
    later = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    source, target = (args[0], output) if name == "_to_copy" else (args[1], args[0])
    if source.is_cuda and target.is_cuda:
        return False
    return not (later and is_pinned(target if source.is_cuda else source))


@contextmanager
def finding_races() -> Iterator[RaceFinder]:
    """A context inside `pretending` that looks for races; gives the finder."""
    finder = RaceFinder()
    numpy, tolist = torch.Tensor.numpy, torch.Tensor.tolist

    def watched_numpy(tensor: Tensor, *, force: bool = False) -> Any:
        finder.host_access(tensor, False, "numpy")
        return numpy(tensor, force=force)

    def watched_tolist(tensor: Tensor) -> Any:
        finder.host_access(tensor, False, "tolist")
        return tolist(tensor)

    OBSERVERS.append(finder)
    try:
        with mock.patch.multiple(torch.Tensor, numpy=watched_numpy, tolist=watched_tolist):
            yield finder
    finally:
        OBSERVERS.remove(finder)
