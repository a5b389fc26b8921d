"""Controller: forecasts, plans and copies weights for the next batch while the current one runs.

If a forecaster raises, or its forecast does not fit the model, the average of past loads takes its place; without past
loads the placement stays as it is. The model's outputs do not depend on any of this.

Shape suffixes: B sequences, L MoE layers, E logical experts.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from data.arrays import IntArray
from data.traces.trace import TokenBatch
from predictor.baselines.history import Ema
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, NoHistoryError, OnlineForecaster
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.balancing.planner import Planner
from runtime.distributed.device import use_device
from runtime.distributed.ranks import Ranks, rows_of

HISTORY = 64
"""Batches whose loads are kept."""
PATIENCE_S = 30.0
"""Seconds that the first batch waits for its forecast, because nothing runs beside it."""
CLOSE_S = 5.0
"""Seconds that closing waits for copies to be issued."""
MOST_TOKENS = 1e12
"""Tokens for one expert above which a forecast counts as broken."""
Observed = tuple[TokenBatch | None, IntArray, IntArray | None]
"""The tokens of a batch that has run, its load `[L, E]`, and, if known, those of this rank's sequences `[b, L, E]`."""
FOREIGN = (Exception, SystemExit)
"""What the code of others may raise without ending the run."""
log = logging.getLogger(__name__)


class Transfer(Protocol):
    """Makes plans active: copies weights into replica slots, or has a cache fetch them."""

    plan: ReplicationPlan

    @property
    def arrived(self) -> bool:
        """Whether everything that was started is complete on this rank."""
        ...

    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Begins to make a plan active; returns the changes. Only rank 0 has the forecast behind it."""
        ...

    def commit(self) -> ReplicationPlan:
        """Makes the started plan active; called between batches."""
        ...

    def computed(self) -> None:
        """Notes that a batch has been issued: what it reads is not overwritten before it has run."""
        ...

    def close(self) -> None:
        """Waits for copies under way."""
        ...

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes of weights that some moves copy."""
        ...


@dataclass(frozen=True)
class Preparation:
    """What was done ahead of a batch.

    Attributes:
        forecast: The forecast it rests on; None if there was nothing to forecast from, and on all ranks but the first.
        layer_moves: Experts copied in each MoE layer, `[L]`.
        nbytes: Bytes of these experts, over all layers.
        forecast_ms: Milliseconds that the forecast took.
        plan_ms: Milliseconds that the plan took.
        move_ms: Milliseconds until the copies were issued (on a CPU: done).
    """

    forecast: LoadForecast | None
    layer_moves: tuple[int, ...]
    nbytes: int
    forecast_ms: float
    plan_ms: float
    move_ms: float

    @property
    def moves(self) -> int:
        """Experts copied."""
        return sum(self.layer_moves)


class Controller:
    """Prepares the placement of the next batch on a thread of its own; on several ranks all call it in step.

    Rank 0 forecasts and plans for all ranks, because processors of different kinds round differently and plans must be
    the same everywhere.

    Args:
        forecaster: Forecasts loads; None never replicates.
        planner: Turns forecasts into plans.
        transfer: Makes plans active; it holds the active one.
        ranks: The ranks.

    Raises:
        ValueError: If the planner moves homes, because weights are copied from fixed homes.

    Attributes:
        history: Loads of the last batches, oldest first, `[K, L, E]`.
        fallbacks: How often something took a forecast's or a plan's place, by the error.
        late: Preparations that were not ready when their batch began.
    """

    def __init__(self, forecaster: Forecaster | None, planner: Planner, transfer: Transfer, ranks: Ranks) -> None:
        if getattr(planner, "moving_homes", False):
            raise ValueError(
                "the planner has moving_homes=True, but this engine copies weights from homes that never change; "
                "use HomePlanner with moving_homes=False"
            )
        self.forecaster, self.planner, self.transfer, self.ranks = forecaster, planner, transfer, ranks
        layers, experts = transfer.plan.phy2log.shape[0], transfer.plan.num_experts
        self.history: IntArray = np.zeros((0, layers, experts), dtype=np.int64)
        self.fallbacks: Counter[str] = Counter()
        self.late = 0
        self._thread = _TaskThread("switchcast-controller", ranks.device)
        self._future: Future[Preparation] | None = None
        self._unlearned: deque[Observed] = deque(maxlen=HISTORY)
        self._awaited, self._closed, self._copying = False, False, threading.Lock()

    def prepare(self, upcoming: TokenBatch | None) -> None:
        """Starts to prepare for a batch, unless an earlier preparation is still running."""
        if self.forecaster is not None and self._future is None:
            if upcoming is not None:  # a copy, because the model runs these tokens and a forecaster might change them
                upcoming = replace(upcoming, input_ids=upcoming.input_ids.clone(), mask=upcoming.mask.clone())
            observed, history = list(self._unlearned), self.history.copy()
            self._unlearned.clear()
            self._future, self._awaited = self._thread.submit(self._prepare, upcoming, history, observed), False

    def commit(self, wait: bool = False) -> Preparation | None:
        """Between batches: makes the prepared plan active if all ranks are ready, else leaves it for the next time.

        Raises:
            RuntimeError: If weights could not be copied.
        """
        if self._future is None:
            return None
        if wait and not self._awaited:  # only once: what is late by then may never come
            wait_for([self._future], PATIENCE_S)
            self._awaited = True
        if not self.ranks.all_ready(self._future.done() and (wait or self.transfer.arrived)):
            self.late += 1
            return None
        preparation, self._future = self._future.result(), None
        self.transfer.commit()
        return preparation

    @property
    def learns_sequences(self) -> bool:
        """Whether the forecaster learns from the loads of sequences."""
        return isinstance(self.forecaster, OnlineForecaster)

    def observe(
        self, load_LE: IntArray, tokens: TokenBatch | None = None, sequences_BLE: IntArray | None = None
    ) -> None:
        """Adds the load of a batch that has run to the history, and to what the forecaster learns from.

        Args:
            load_LE: The load.
            tokens: What `prepare` was given for this batch.
            sequences_BLE: Loads of this rank's sequences; None, on all ranks, if only the batch's is known.
        """
        self.history = np.concatenate([self.history, load_LE[None]])[-HISTORY:]
        if self.learns_sequences:
            self._unlearned.append((tokens, load_LE, sequences_BLE))

    def close(self) -> None:
        """Ends the thread after its current task, without waiting for a forecast; no copies are started from now on."""
        self._closed = True
        if self._copying.acquire(timeout=CLOSE_S):  # copies under way end first, unless they wait for a lost rank
            self._copying.release()
        self._thread.close()

    def _prepare(self, upcoming: TokenBatch | None, history: LoadHistory, observed: list[Observed]) -> Preparation:
        times, forecast, target = [time.perf_counter()], None, self.transfer.plan
        observed = [(tokens, load, self._of_all_ranks(tokens, own)) for tokens, load, own in observed]
        if self.ranks.rank == 0:
            self._learn(observed)
            forecast = self._forecast(upcoming, history)
        times.append(time.perf_counter())
        if forecast is not None:
            target = self._plan(forecast, history)
        target = target.with_slots(self.ranks.broadcast(target.phy2log))
        times.append(time.perf_counter())
        with self._copying:
            if self._closed:
                raise RuntimeError("the engine was closed before the weights were copied")
            moves = self.transfer.start(target, forecast)
        times.append(time.perf_counter())
        spans = [1e3 * (stop - begin) for begin, stop in pairwise(times)]
        each = Counter(move.layer for move in moves)
        layer_moves = tuple(each[layer] for layer in range(len(target.phy2log)))
        return Preparation(forecast, layer_moves, self.transfer.nbytes(moves), *spans)

    def _of_all_ranks(self, tokens: TokenBatch | None, own_BLE: IntArray | None) -> IntArray | None:
        """Loads of all sequences of a batch, `[B, L, E]`, on rank 0; each rank has those of its own, `[b, L, E]`."""
        if own_BLE is None or tokens is None or self.ranks.world == 1:
            return own_BLE
        size, world = len(tokens.mask), self.ranks.world
        counts = [len(range(size)[rows_of(size, rank, world)]) for rank in range(world)]
        padded = np.zeros((max(counts), *own_BLE.shape[1:]), dtype=np.int32)
        padded[: counts[self.ranks.rank]] = own_BLE[: counts[self.ranks.rank]]
        return np.concatenate([part[:count] for part, count in zip(self.ranks.collect(padded), counts, strict=False)])

    def _learn(self, observed: list[Observed]) -> None:
        """Lets the forecaster learn from batches that have run, before it forecasts the next."""
        if not isinstance(self.forecaster, OnlineForecaster):
            return
        try:
            for tokens, load, sequences in observed:
                self.forecaster.observe(tokens, load, sequences)
        except FOREIGN as error:  # as in _forecast
            self._fall_back(f"forecaster '{self.forecaster.name}'", error, "it has not learned from all batches")

    def _forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast | None:
        """The forecaster's forecast, else one from the history, else none."""
        assert self.forecaster is not None
        try:
            forecast = self.forecaster.forecast(upcoming, history)
            if forecast.share.shape != history.shape[1:]:
                raise ValueError(f"its forecast is {forecast.share.shape}, the model has {history.shape[1:]}")
            if not (forecast.load <= MOST_TOKENS).all():
                raise ValueError(f"its forecast is of {forecast.load.max()} tokens for one expert")
            return forecast
        except NoHistoryError:  # nothing has run yet, so the placement stays as it is
            return None
        except FOREIGN as error:  # the batch must run whatever a forecaster does
            self._fall_back(f"forecaster '{self.forecaster.name}'", error, "past loads take its place")
        return Ema().forecast(upcoming, history) if len(history) else None

    def _plan(self, forecast: LoadForecast, history: LoadHistory) -> ReplicationPlan:
        """The planner's plan, else the active one."""
        try:
            target = self.planner.plan(forecast, self.transfer.plan, history)
            if target.home_slots is not None and (target.home_slots != self.transfer.plan.homes).any():
                raise ValueError("its plan moves homes, but this engine copies weights from homes that never change")
            return target
        except FOREIGN as error:  # the other ranks wait for a plan
            self._fall_back("planner", error, "the placement stays as it is")
            return self.transfer.plan

    def _fall_back(self, failed: str, error: BaseException, instead: str) -> None:
        reason = f"{type(error).__name__}: {error}"
        if not self.fallbacks:
            log.warning("%s failed (%s); %s", failed, reason, instead)
        self.fallbacks[reason] += 1


class _TaskThread:
    """One daemon thread that runs tasks in order; a task that hangs does not keep the program from ending."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queues a call; the future gets its result or error."""
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: function(*args)))
        return future

    def close(self) -> None:
        """Ends the thread after its current task, without waiting."""
        self._tasks.put(None)

    def _run(self) -> None:
        use_device(self._device)
        while (task := self._tasks.get()) is not None:
            future, call = task
            try:
                future.set_result(call())
            except BaseException as error:  # the caller that asks for the result gets it
                future.set_exception(error)
