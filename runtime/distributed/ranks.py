"""Ranks: the processes that share one model, one for each device; or this process alone.

NCCL carries what lies on CUDA devices, gloo the rest. Start them with torchrun; alone, nothing is opened.
"""

import atexit
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

EMULATED = 8
"""Devices of one process by itself."""
BEAT_S = 0.2
"""Seconds between two signs of life."""
_opened = 0


def exit_now(code: int) -> NoReturn:
    """Ends this process without waiting for any other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankLostError(RuntimeError):
    """Another rank is gone or hangs; the message names it."""


class Ranks:
    """The ranks of a job.

    Args:
        timeout_s: Seconds after which a rank that does not answer counts as lost.

    Raises:
        ValueError: If that is no time at all.

    Attributes:
        rank: 0..world - 1.
        world: Number of ranks.
        moves: The process group for whatever runs beside the model: plans and weights.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if timeout_s <= 0:
            raise ValueError(f"the timeout is {timeout_s} seconds, expected more than 0")
        self.timeout_s = timeout_s
        self.moves: Any = None
        self._stop = threading.Event()
        self._on_sigterm: Any = signal.SIG_DFL

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cpu")

    def devices(self, asked: int | None) -> int:
        """How many devices experts are spread over: as many as asked for, else one a process; emulated if alone.

        Raises:
            ValueError: If there are several processes, but not one for each device asked for.
        """
        if self.world > 1 and asked not in (None, self.world):
            raise ValueError(f"devices is {asked}, but {self.world} processes run; leave it out, or start as many")
        if asked is None:
            return self.world if self.world > 1 else EMULATED
        return asked

    def peak_gib(self) -> list[float]:
        """Most memory each rank has held so far, in GiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # Linux counts in KiB
        rows: list[list[float]] = self.gather(torch.tensor([peak])).tolist()
        return [row[0] for row in rows]

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            global _opened
            _opened += 1  # every rank counts alike; names of an earlier group must not come back
            try:
                self._meet()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise RankLostError(f"{self.world} processes did not meet in {self.timeout_s} s ({reason})") from None
            self._told = ""
            self._watches = self._clones(2)
            self._stop.clear()
            with suppress(ValueError):  # not the main thread
                self._on_sigterm = signal.signal(signal.SIGTERM, self._end)
                signal.siginterrupt(signal.SIGTERM, False)
            threading.Thread(target=self._beat, daemon=True, name="switchcast-beat").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1:
            self._stop.set()
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, self._on_sigterm)
            if kind is None:
                dist.destroy_process_group()
            else:  # closing a group waits for what is under way in it, which now may never end
                atexit.register(exit_now, 1)

    def _meet(self) -> None:
        """Opens the store and the groups, once all ranks are there."""
        patience = timedelta(seconds=self.timeout_s)
        store, _, _ = next(rendezvous("env://", self.rank, self.world, timeout=patience))
        self._store: Any = dist.PrefixStore(f"switchcast/{_opened}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world, timeout=patience)
        self.moves = dist.new_group(timeout=timedelta(days=1))  # a late forecast is no failure

    def check_alike(self, facts: dict[str, str]) -> None:
        """Refuses ranks that differ in what they run.

        Raises:
            ValueError: Naming the fact, the rank and both values.
        """
        if self.world == 1:
            return
        self._store.set(f"facts/{self.rank}", json.dumps(facts))
        first = json.loads(self._store.get("facts/0"))
        for rank in range(1, self.world):
            theirs = json.loads(self._store.get(f"facts/{rank}"))
            for name in first | theirs:
                if theirs.get(name) != first.get(name):
                    raise ValueError(f"{name} is {first.get(name)} on rank 0 and {theirs.get(name)} on rank {rank}")

    def gather(self, row: Tensor) -> Tensor:
        """Every rank's row `[...]`, which must be of the same shape: `[world, ...]`."""
        if self.world == 1:
            return row[None]
        rows = row.new_empty((self.world, *row.shape))
        dist.all_gather(list(rows), row)
        return rows

    def all_to_all(self, rows: Tensor, to: list[int], out: Tensor, sizes: list[int]) -> Any:
        """Starts sending rows to every rank in order, and receiving theirs into `out`; the answer has `wait()`."""
        return dist.all_to_all_single(out, rows, sizes, to, async_op=True)

    def all_ready(self, ready: bool) -> bool:
        """Whether all ranks are ready."""
        if self.world == 1:
            return ready
        flag = torch.tensor([int(ready)])
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def broadcast(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What rank 0 holds, told to all beside the model; the others give an array of that shape."""
        if self.world == 1:
            return array
        told = torch.from_numpy(np.array(array))
        dist.broadcast(told, 0, group=self.moves)
        return np.asarray(told.numpy())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Gives a collective's failure the name of the rank that is gone.

        Raises:
            RankLostError: If some rank shows no sign of life; other errors pass unchanged.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, RankLostError):
                raise
            if lost := self._lost():
                raise RankLostError(f"{lost}; rank {self.rank} stops ({str(error).splitlines()[0]})") from None
            raise

    def _end(self, number: int, frame: Any) -> None:
        """A launcher that sees one rank die ends all others at once: the name of that rank comes first."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if lost := self._lost():
            raise RankLostError(f"{lost}; rank {self.rank} stops")
        raise SystemExit(128 + number)

    def _clones(self, count: int) -> list[Any]:
        """Connections of their own to the store: one serves one thread at a time."""
        return [self._store.clone() for _ in range(count)]

    def _beat(self) -> None:
        (store,), count = self._clones(1), 0
        with suppress(RuntimeError):
            while not self._stop.wait(BEAT_S):
                count += 1
                store.set(f"beat/{self.rank}", str(count))
                if not self._told and store.check(["lost"]):
                    self._told = store.get("lost").decode()

    def _lost(self) -> str:
        """Which ranks show no sign of life; "" if all do."""
        for store in self._watches:
            with suppress(RuntimeError):  # a signal may break a call to the store off
                return self._told or self._without_beat(store)
        return self._told or "rank 0 is lost, and the store with it"

    def _without_beat(self, store: Any) -> str:
        before = self._beats(store)
        self._stop.wait(10 * BEAT_S)
        now = self._beats(store)
        gone = [str(rank) for rank in range(self.world) if rank != self.rank and before[rank] == now[rank]]
        lost = f"rank {', '.join(gone)} is lost" if gone else ""
        if lost:
            store.set("lost", lost)
            self._stop.wait(4 * BEAT_S)  # until all have heard: whoever leaves now looks lost as well
        return self._told or lost

    def _beats(self, store: Any) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in range(self.world)]
        return [store.get(key) if store.check([key]) else b"" for key in keys]
