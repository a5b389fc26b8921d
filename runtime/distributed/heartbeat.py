"""Heartbeat: finds out which ranks have died or hang, so that an error names the rank that caused it.

A collective over gloo fails once its partner is gone, and the error then asks `lost` for the name. One over NCCL does
not fail: the host waits for a stream that waits for ever. The heartbeat's own thread therefore ends this process if a
rank falls silent while this one has waited for `timeout_s` seconds.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

HEARTBEAT_S = 0.2
"""Seconds between two beats of a rank."""
SILENCE_S = 10 * HEARTBEAT_S
"""Seconds without a beat after which a rank counts as lost."""
ANNOUNCE_S = 4 * HEARTBEAT_S
"""Seconds a rank stays alive after it has announced a lost one: if it left at once, it would look lost itself."""
STORE_S = 3 * (SILENCE_S + ANNOUNCE_S)
"""Seconds after which a store that does not respond counts as lost: a stopped process keeps its connections."""


def exit_now(code: int) -> NoReturn:
    """Ends this process without waiting for other ranks or threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankLostError(RuntimeError):
    """Another rank has died or hangs; the message names it."""


class Heartbeat:
    """Counts up in the job's store while this rank lives, and watches the counters of the other ranks.

    While it runs, SIGTERM raises `RankLostError` if a rank is lost, because a launcher that sees one rank die sends
    SIGTERM to all others at once.

    Args:
        store: The job's store, shared by all ranks.
        rank: This rank.
        world: Number of ranks.
        timeout_s: Seconds after which a rank that does not respond counts as lost.

    Attributes:
        waiting_since: When the main thread last began to wait for other ranks (`time.monotonic`); None if it does not.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout_s: float) -> None:
        self._rank, self._world, self._timeout_s = rank, world, timeout_s
        self.waiting_since: float | None = None
        self._announced = ""
        self._stop = threading.Event()
        # Opened before the first beat: the store's server looks up the name of each new client (getnameinfo) and
        # responds to nobody meanwhile, for seconds where the name service does not respond. Two connections, because a
        # signal may break off a call on the first one.
        self._stores = [store.clone() for _ in range(2)]
        self._on_sigterm: Any = signal.SIG_DFL

    def start(self) -> None:
        """Starts beating and watching on threads of their own."""
        with suppress(ValueError):  # signals can be handled on the main thread only
            self._on_sigterm = signal.signal(signal.SIGTERM, self._terminate)
            signal.siginterrupt(signal.SIGTERM, False)
        for name, body in (("switchcast-heartbeat", self._beat), ("switchcast-watch", self._watch)):
            threading.Thread(target=body, daemon=True, name=name).start()

    def stop(self) -> None:
        """Ends the beat and gives SIGTERM its former handler."""
        self._stop.set()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def lost(self) -> str:
        """'rank 1, 3 is lost' for the ranks without a beat, '' if there are none.

        Takes `SILENCE_S` seconds, or `STORE_S` if the store does not respond.
        """
        found: list[str] = []

        def look() -> None:
            for store in self._stores:
                with suppress(RuntimeError):
                    found.append(self._announced or self._silent_ranks(store))
                    return

        looking = threading.Thread(target=look, daemon=True, name="switchcast-lost")
        looking.start()
        looking.join(STORE_S)
        return found[0] if found else self._announced or "rank 0 is lost, and the store with it"

    def _beat(self) -> None:
        store, count = self._stores[0], 0
        with suppress(RuntimeError):
            while not self._stop.wait(HEARTBEAT_S):
                count += 1
                store.set(f"beat/{self._rank}", str(count))
                if not self._announced and store.check(["lost"]):
                    self._announced = store.get("lost").decode()

    def _watch(self) -> None:
        """Ends this process if the main thread waits for a rank that is lost; see the module's docstring."""
        while not self._stop.wait(HEARTBEAT_S):
            began = self.waiting_since
            # a collective that can fail does so at the timeout, and its error comes first
            overdue = began is not None and time.monotonic() - began > self._timeout_s + 2 * SILENCE_S
            if overdue and (lost := self.lost()) and self.waiting_since == began:
                print(f"RankLostError: {lost}; rank {self._rank} stops", file=sys.stderr)
                exit_now(1)

    def _silent_ranks(self, store: Any) -> str:
        before = self._beats(store)
        self._stop.wait(SILENCE_S)
        now = self._beats(store)
        silent = [str(rank) for rank in range(self._world) if rank != self._rank and before[rank] == now[rank]]
        lost = f"rank {', '.join(silent)} is lost" if silent else ""
        if lost:
            store.set("lost", lost)
            self._stop.wait(ANNOUNCE_S)
        return self._announced or lost

    def _beats(self, store: Any) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in range(self._world)]
        return [store.get(key) if store.check([key]) else b"" for key in keys]

    def _terminate(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if lost := self.lost():
            raise RankLostError(f"{lost}; rank {self._rank} stops")
        raise SystemExit(128 + number)
