"""on_fake_ranks: runs a function as one rank after another, in this process, and records the collectives of each rank.

    logs = on_fake_ranks(4, function)      # function(rank) opens `with Ranks() as ranks:` and works on CUDA tensors
    assert_one_thread(logs)
    assert_same_order(logs)
    assert_first_calls_are_joined(logs)

Ranks do not communicate. A broadcast carries the values of its source if that rank ran before, an exchange of rows
brings zeros, and torch's fake process group fills everything else with what the rank itself sends. So the inputs of
ranks must be such that their calls do not depend on other ranks' values. Timing and real hangs cannot be seen.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from runtime.distributed.ranks import Ranks
from tests.helpers.collectives import Collective, watched_collectives
from tests.helpers.cuda_streams import CONTEXTS, forget
from tests.helpers.pretend_cuda import pretending

POINT_TO_POINT = ("batch_isend_irecv", "irecv", "isend", "recv", "send")


@dataclass(frozen=True)
class RecordedCall:
    """One call of a rank.

    Attributes:
        thread: Name of the calling thread.
        group: Name of the process group.
        members: Ranks of the group.
        operation: Name of the function of torch.distributed.
        sizes: Shapes of the tensors.
        transfers: Of a point-to-point call: 'isend' or 'irecv', and the other rank, for each tensor.
        nccl: Whether NCCL would carry it; else gloo does.
        before: Number of collectives that this thread has called before it, which all ranks count alike.
    """

    thread: str
    group: str
    members: tuple[int, ...]
    operation: str
    sizes: tuple[tuple[int, ...], ...]
    transfers: tuple[tuple[str, int], ...]
    nccl: bool
    before: int

    @property
    def point_to_point(self) -> bool:
        """Whether only some ranks of the group call it."""
        return self.operation in POINT_TO_POINT


@dataclass
class RankLog:
    """What a rank did.

    Attributes:
        calls: What it called, in order.
        contexts: Devices that any of its threads made current, each of which costs memory on a GPU.
        result: What its function returned.
    """

    rank: int
    calls: list[RecordedCall] = field(default_factory=list)
    contexts: set[int] = field(default_factory=set)
    result: Any = None

    @property
    def nccl(self) -> list[RecordedCall]:
        """The calls on CUDA tensors."""
        return [call for call in self.calls if call.nccl]

    @property
    def gloo(self) -> list[RecordedCall]:
        """The calls on tensors of the host."""
        return [call for call in self.calls if not call.nccl]


def on_fake_ranks(world: int, function: Callable[[int], Any], machines: int = 1) -> list[RankLog]:
    """Runs `function(rank)` for each rank in turn, with a pretended CUDA device for each; machines take turns too."""
    logs, broadcast = [], {}
    with _zeros_exchanged(), pretending(devices=world):
        for rank in range(world):
            log = RankLog(rank)
            forget()
            with _as_rank(rank, world, machines), watched_collectives(_Recorder(log, broadcast)):
                log.result = function(rank)
            log.contexts = {device for device, thread in CONTEXTS}
            if dist.is_initialized():
                dist.destroy_process_group()
            logs.append(log)
    return logs


class _Recorder:
    """Records the calls of one rank; broadcasts carry what their source sent.

    Args:
        log: Log of the rank.
        sent: Values broadcast so far, by group and number; shared by all ranks.
    """

    def __init__(self, log: RankLog, sent: dict[tuple[str, int], Tensor]) -> None:
        self._log, self._sent, self._broadcasts = log, sent, Counter[str]()

    def __call__(self, call: Collective, run: Callable[[], Any]) -> Any:
        before = [c for c in self._log.calls if c.thread == call.thread and not c.point_to_point]
        pairs = call.arguments.get("p2p_op_list") or []
        transfers = tuple((pair.op.__name__, pair.peer) for pair in pairs)
        if call.operation in POINT_TO_POINT and not pairs:
            peer = call.arguments.get("dst", call.arguments.get("src"))
            transfers = ((call.operation, peer),)
        members = tuple(dist.get_process_group_ranks(call.group))
        sizes = tuple(tuple(tensor.shape) for tensor in call.tensors)
        self._log.calls.append(
            RecordedCall(
                call.thread, call.group_name, members, call.operation, sizes, transfers, call.on_cuda, len(before)
            )
        )
        result = run()
        if call.operation == "broadcast":
            self._pass_on(call)
        return result

    def _pass_on(self, call: Collective) -> None:
        key = call.group_name, self._broadcasts[call.group_name]
        self._broadcasts[call.group_name] += 1
        (tensor,) = call.tensors
        if call.arguments["src"] == self._log.rank:
            self._sent[key] = tensor.clone()
        elif key in self._sent:
            tensor.copy_(self._sent[key])


@contextmanager
def _as_rank(rank: int, world: int, machines: int) -> Iterator[None]:
    """The environment and process groups of one rank; other ranks say what this one would in their place."""
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    init, new_group, hosts = dist.init_process_group, dist.new_group, [f"machine {r % machines}" for r in range(world)]

    def init_fake(*args: Any, **kwargs: Any) -> None:
        init("fake", store=FakeStore(), rank=rank, world_size=world)

    def new_fake(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return new_group(*args)

    def meet(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield dist.HashStore(), rank, world

    def exchange(ranks: Ranks, topic: str, said: Any) -> list[Any]:
        if topic == "homes":
            return [(host, said[1]) for host in hosts]
        if topic == "mapped homes":
            return [[o for o in range(world) if o != r and hosts[o] == hosts[r]] for r in range(world)]
        return [said] * world

    def open_block(handle: Any, shape: Sequence[int], like: Tensor) -> Tensor:
        return like.new_zeros(tuple(shape))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(dist, "init_process_group", init_fake))
        stack.enter_context(mock.patch.object(dist, "new_group", new_fake))
        stack.enter_context(mock.patch("runtime.distributed.ranks.rendezvous", meet))
        stack.enter_context(mock.patch.object(Ranks, "exchange", exchange))
        stack.enter_context(mock.patch.object(Ranks, "host", hosts[rank]))
        stack.enter_context(mock.patch("runtime.experts.transfer.open_block", open_block))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "_share_cuda_", return_value=(0, b"handle")))
        yield


class _Done:
    """The work of a collective that is complete."""

    def wait(self, *args: Any) -> bool:
        return True


@contextmanager
def _zeros_exchanged() -> Iterator[None]:
    """The fake process group refuses sizes that do not fit its own rows; here every rank receives zeros."""

    @wraps(dist.all_to_all_single)
    def all_to_all_single(output: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> _Done | None:
        output.zero_()
        return _Done() if async_op else None

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
        mock.patch.object(distributed_c10d, "all_to_all_single", all_to_all_single),
    ):
        yield


def assert_one_thread(logs: Sequence[RankLog]) -> None:
    """All NCCL calls of a rank come from one thread: threads are in no order, and other ranks' may differ."""
    for log in logs:
        threads = {call.thread: f"{call.operation} in group {call.group}" for call in reversed(log.nccl)}
        found = ", ".join(f"{thread} ({first})" for thread, first in sorted(threads.items()))
        assert len(threads) <= 1, f"rank {log.rank} makes NCCL calls from {len(threads)} threads: {found}"


def assert_same_order(logs: Sequence[RankLog]) -> None:
    """All ranks call the same collectives of the same groups in the same order, and their transfers match."""
    orders = [[(call.group, call.operation) for call in log.nccl if not call.point_to_point] for log in logs]
    for log, order in zip(logs, orders, strict=True):
        for number, (theirs, ours) in enumerate(zip(orders[0], order, strict=False)):
            assert theirs == ours, f"NCCL collective {number} is {theirs} on rank 0 and {ours} on rank {log.rank}"
        counts = f"{len(orders[0])} NCCL collectives on rank 0, {len(order)} on rank {log.rank}"
        assert len(orders[0]) == len(order), counts
    sent, received = _transfers(logs, "isend"), _transfers(logs, "irecv")
    for key in sorted(sent.keys() | received.keys()):
        group, source, target = key
        assert sent[key] == received[key], (
            f"group {group}: rank {source} sends {sent[key]} to rank {target}, which expects {received[key]}"
        )


def _transfers(logs: Sequence[RankLog], kind: str) -> dict[tuple[str, int, int], list[tuple[int, tuple[int, ...]]]]:
    """Number of collectives before each transfer and its shape, by group, source and target."""
    found: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    for log in logs:
        for call in log.nccl:
            for (operation, other), size in zip(call.transfers, call.sizes, strict=bool(call.transfers)):
                if operation.removeprefix("i") == kind.removeprefix("i"):
                    ends = (log.rank, other) if kind == "isend" else (other, log.rank)
                    found[call.group, *ends].append((call.before, size))
    return found


def assert_first_calls_are_joined(logs: Sequence[RankLog]) -> None:
    """The first NCCL call of each group is made by all its ranks: it opens the communicator, which needs them all."""
    groups = {call.group: call.members for log in logs for call in log.nccl}
    for group, members in groups.items():
        first = {log.rank: next((c for c in log.nccl if c.group == group), None) for log in logs if log.rank in members}
        earliest = min(call.before for call in first.values() if call is not None)
        absent = [rank for rank, call in first.items() if call is None or call.before > earliest]
        operation = next(c.operation for c in first.values() if c is not None and c.before == earliest)
        assert not absent, f"ranks {absent} do not join {operation}, the first NCCL call of group {group}"
