"""Ranks: the processes that share one model, their process groups and collectives.

Under torchrun each process is one rank with one device. A process started without torchrun is a single rank: it opens
no process group, and the collectives below return their input. NCCL carries CUDA tensors, gloo all others.
"""

import atexit
import json
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from data.arrays import IntArray
from data.errors import first_line
from data.models.device import Device, pick_device
from runtime.distributed.device import use_device
from runtime.distributed.heartbeat import Heartbeat, RankLostError, exit_now

EMULATED_DEVICES = 8
"""Devices that a single rank on a CPU emulates unless told otherwise; a CUDA device is one device."""
FOR_EVER = timedelta(days=365)
"""Timeout of groups in which a rank may be late without being lost."""
_opened = 0
_stores: dict[tuple[str | None, ...], Any] = {}
"""One store a job, kept until the process ends: were it rank 0's to open anew each time, a rank that opens before rank
0 has closed would join the old one."""


def rows_of(size: int, rank: int, world: int) -> slice:
    """Which of `size` sequences one of several ranks runs: all ranks run the same number, or one sequence less."""
    return slice(rank * size // world, (rank + 1) * size // world)


class Ranks:
    """The ranks of a job; `with ranks:` opens the process groups and starts the heartbeat.

    All NCCL calls come from the main thread and use one communicator, made with all ranks when the groups open: calls
    on two communicators, or from two threads, could wait for each other for ever. What travels while the model runs
    uses gloo, or needs no partner.

    Args:
        timeout_s: Seconds after which a rank that does not respond counts as lost.
        device: "cpu" or "cuda"; None takes CUDA where this process has a device.

    Raises:
        ValueError: If `timeout_s` is not positive, or CUDA is asked for and not there.

    Attributes:
        rank: This rank, 0..world - 1.
        world: Number of ranks.
        device: The device this rank computes on.
        background: gloo's process group for plans and weights, which are sent while the model runs.
    """

    def __init__(self, timeout_s: float = 60.0, device: Device | None = None) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if timeout_s <= 0:
            raise ValueError(f"the timeout is {timeout_s} seconds, expected more than 0")
        self.timeout_s = timeout_s
        self.device = pick_device(device)
        self.background: Any = None
        self._said: Counter[str] = Counter()

    def devices(self, asked: int | None) -> int:
        """Number of devices that experts are spread over: one for each rank; a single rank emulates as many as asked.

        Without a number, a single rank is one device on CUDA, and emulates `EMULATED_DEVICES` on a CPU.

        Raises:
            ValueError: If there are several ranks, but not one for each device asked for.
        """
        if self.world > 1 and asked not in (None, self.world):
            raise ValueError(
                f"{asked} devices, but {self.world} processes run: leave the number of devices out, or start {asked}"
            )
        if asked is None:
            return EMULATED_DEVICES if self.world == 1 and self.device.type == "cpu" else self.world
        return asked

    def peak_gib(self) -> list[float]:
        """Peak host memory of each rank so far, in GiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux counts in KiB
        rows: list[list[float]] = self.gather(torch.tensor([peak])).tolist()
        return [row[0] for row in rows]

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            global _opened
            _opened += 1  # equal on all ranks; gives each opening its own keys in the store
            try:
                self._open_groups()
            except RuntimeError as error:
                reason = first_line(error)
                raise RankLostError(f"{self.world} processes did not meet in {self.timeout_s} s ({reason})") from None
            self._heartbeat = Heartbeat(self._store, self.rank, self.world, self.timeout_s)
            self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self.world > 1:
            self._heartbeat.stop()
            if kind is None:
                dist.destroy_process_group()
            else:  # closing a group waits for its unfinished collectives, which may never finish now
                atexit.register(exit_now, 1)

    def _open_groups(self) -> None:
        """Opens the store and the process groups once all ranks have connected.

        NCCL's own watchdog would end a rank whose partner pauses, by SIGABRT and without a name; on CUDA the heartbeat
        alone finds out who is lost.
        """
        timeout, cuda = timedelta(seconds=self.timeout_s), self.device.type == "cuda"
        job = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
        if job not in _stores:
            _stores[job] = next(rendezvous("env://", self.rank, self.world, timeout=timeout))[0]
        _stores[job].set_timeout(timeout)
        self._store: Any = dist.PrefixStore(f"switchcast/{_opened}", _stores[job])  # type: ignore[attr-defined]
        use_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=self._store, rank=self.rank, world_size=self.world,
            timeout=FOR_EVER if cuda else timeout, device_id=self.device if cuda else None,
        )  # fmt: skip
        self.background = dist.new_group(backend="gloo", timeout=FOR_EVER)  # a late forecast is no failure

    def check_alike(self, facts: dict[str, str]) -> None:
        """Refuses ranks that run different models, versions or options.

        Raises:
            ValueError: Naming the fact, the rank and both values.
        """
        if self.world == 1:
            return
        first, *others = self.exchange("facts", facts)
        for rank, other in enumerate(others, 1):
            for name in first | other:
                if other.get(name) != first.get(name):
                    self._let_all_read()
                    raise ValueError(f"{name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {rank}")

    def _let_all_read(self) -> None:
        """Holds rank 0 until all others have come here: the store, which they may be reading, ends with rank 0."""
        with suppress(RuntimeError):
            if self.rank:
                self._store.set(f"read/{self.rank}", "")
            else:
                self._store.wait([f"read/{rank}" for rank in range(1, self.world)])

    def exchange(self, topic: str, said: Any) -> list[Any]:
        """What each rank says about a topic, anything that JSON can hold; all ranks call this in the same order.

        Raises:
            RankLostError: If a rank says nothing within the timeout.
        """
        if self.world == 1:
            return [said]
        self._said[topic] += 1
        key = f"{topic}/{self._said[topic]}"
        try:
            self._store.set(f"{key}/{self.rank}", json.dumps(said))
            return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world)]
        except RuntimeError:
            late = f"a rank has not sent its {topic} in {self.timeout_s} s (a larger timeout waits longer)"
            raise RankLostError(f"{self._heartbeat.lost() or late}; rank {self.rank} stops") from None

    @property
    def host(self) -> str:
        """This machine's name, equal for ranks that share its memory and devices."""
        return socket.gethostname()

    def gather(self, row: Tensor) -> Tensor:
        """All-gather: every rank's `row`, of the same shape `[...]` on all ranks, stacked to `[world, ...]`."""
        if self.world == 1:
            return row[None]
        self._waits()
        rows = row.new_empty((self.world, *row.shape))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(rows.view(-1), row.contiguous().view(-1))
        return rows

    def all_to_all(self, rows: Tensor, send_sizes: list[int], out: Tensor, receive_sizes: list[int]) -> Any:
        """Starts an all-to-all of `rows`, sorted by destination rank, into `out`; returns a handle with `wait()`."""
        self._waits()
        return dist.all_to_all_single(out, rows, receive_sizes, send_sizes, async_op=True)

    def all_ready(self, ready: bool) -> bool:
        """Whether all ranks are ready."""
        if self.world == 1:
            return ready
        self._waits()
        flag = torch.tensor([int(ready)])
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def collect(self, array: IntArray) -> IntArray:
        """Every rank's array, of the same shape `[...]` on all ranks, as `[world, ...]` on rank 0 alone.

        Travels in the background group; the other ranks get their own array, as `[1, ...]`.
        """
        if self.world == 1:
            return array[None]
        own = torch.from_numpy(np.ascontiguousarray(array))
        rows = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, rows, group=self.background)
        return array[None] if rows is None else torch.stack(rows).numpy()

    def broadcast(self, array: IntArray) -> IntArray:
        """Rank 0's array, in the background group; the other ranks pass an array of the same shape."""
        if self.world == 1:
            return array
        tensor = torch.from_numpy(np.array(array))
        dist.broadcast(tensor, 0, group=self.background)
        return np.asarray(tensor.numpy())

    def _waits(self) -> None:
        """Notes that the main thread waits for other ranks from now on, inside `watched`."""
        if self._heartbeat.waiting_since is not None:
            self._heartbeat.waiting_since = time.monotonic()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a collective's failure into a `RankLostError` that names the lost rank.

        Raises:
            RankLostError: If a rank has no heartbeat; other errors pass unchanged.
        """
        if self.world > 1:
            self._heartbeat.waiting_since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, RankLostError):
                raise
            if lost := self._heartbeat.lost():
                raise RankLostError(f"{lost}; rank {self.rank} stops ({first_line(error)})") from None
            raise
        finally:
            if self.world > 1:
                self._heartbeat.waiting_since = None
