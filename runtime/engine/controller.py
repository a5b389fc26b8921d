"""Controller: forecasts, plans and moves for the batch that comes next while the current one runs.

A forecaster that raises, or whose forecast does not fit the model, is replaced by the average of past loads, and where
there are none the placement stays as it is; the model's answers do not depend on any of it.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data.traces.trace import TokenBatch
from predictor.baselines.history import Ema
from predictor.forecast import Forecaster, LoadForecast, LoadHistory
from runtime.balancing.plan import ReplicationPlan, SlotMove
from runtime.balancing.planner import Planner
from runtime.distributed.ranks import Ranks

HISTORY = 64  # batches


PATIENCE_S = 30.0
"""Seconds that a first batch, which nothing runs beside, waits for its forecast."""


MOST_TOKENS = 1e12
"""A forecast of more tokens for an expert is taken for a broken one."""


log = logging.getLogger(__name__)


Result = TypeVar("Result")


class Worker(Generic[Result]):
    """Runs what is submitted on a thread of its own, which a hanging task cannot make the program wait for."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Queues a call; its result or error is the future's."""
        future: Future[Result] = Future()
        self._tasks.put((future, lambda: function(*args)))
        return future

    def close(self) -> None:
        """Ends the thread once what it is doing is done; does not wait for that."""
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            try:
                future.set_result(call())
            except BaseException as error:  # handed on to whoever asks for the result
                future.set_exception(error)


class Transfer(Protocol):
    """Brings plans in force: by moving weights, or by having a cache fetch them."""

    plan: ReplicationPlan

    @property
    def arrived(self) -> bool:
        """Whether what was started is done on this rank."""
        ...

    def start(self, target: ReplicationPlan, forecast: LoadForecast | None = None) -> list[SlotMove]:
        """Begins to bring a plan in force, made from a forecast that rank 0 holds; what changes."""
        ...

    def commit(self) -> ReplicationPlan:
        """Puts it in force, between batches."""
        ...

    def nbytes(self, moves: Sequence[SlotMove]) -> int:
        """Bytes that some moves carry."""
        ...


@dataclass(frozen=True)
class Preparation:
    """What was done ahead of a batch.

    Attributes:
        forecast: The forecast it rests on; None where there was nothing to forecast from, and on ranks but the first.
        layer_moves: Experts moved in each MoE layer, `[L]`.
        nbytes: Bytes they weigh, over all layers.
        forecast_ms: Milliseconds the forecast took.
        plan_ms: Milliseconds the plan took.
        move_ms: Milliseconds the moves took to issue (on CPU: to copy).
    """

    forecast: LoadForecast | None
    layer_moves: tuple[int, ...]
    nbytes: int
    forecast_ms: float
    plan_ms: float
    move_ms: float

    @property
    def moves(self) -> int:
        """Experts moved."""
        return sum(self.layer_moves)


class Controller:
    """Prepares the placement of the next batch on a thread of its own; on several ranks, all call it in step.

    Rank 0 forecasts and plans for all: processors that differ may round differently, and plans must not.

    Args:
        forecaster: What forecasts; None never replicates.
        planner: What plans.
        transfer: What moves; it knows the plan in force.
        ranks: The ranks.
    """

    def __init__(self, forecaster: Forecaster | None, planner: Planner, transfer: Transfer, ranks: Ranks) -> None:
        self.forecaster, self.planner, self.transfer, self.ranks = forecaster, planner, transfer, ranks
        layers, experts = transfer.plan.phy2log.shape[0], transfer.plan.num_experts
        self.history: npt.NDArray[np.int64] = np.zeros((0, layers, experts), dtype=np.int64)
        self.fallbacks: Counter[str] = Counter()
        self.late = 0
        self._worker: Worker[Preparation] = Worker("switchcast-controller")
        self._future: Future[Preparation] | None = None
        self._awaited = False

    def prepare(self, upcoming: TokenBatch | None) -> None:
        """Starts preparing for a batch, unless an earlier preparation is still under way."""
        if self.forecaster is not None and self._future is None:
            if upcoming is not None:  # the model runs these tokens: a forecaster gets copies, whatever it does to them
                upcoming = TokenBatch(upcoming.input_ids.clone(), upcoming.mask.clone())
            self._future, self._awaited = self._worker.submit(self._prepare, upcoming, self.history.copy()), False

    def commit(self, wait: bool = False) -> Preparation | None:
        """Between batches: puts what was prepared in force if all ranks have it, else leaves it for the next boundary.

        Raises:
            RuntimeError: If weights could not be moved.
        """
        if self._future is None:
            return None
        if wait and not self._awaited:  # once: what is late by then may never come
            wait_for([self._future], PATIENCE_S)
            self._awaited = True
        if not self.ranks.all_ready(self._future.done() and (wait or self.transfer.arrived)):
            self.late += 1
            return None
        preparation, self._future = self._future.result(), None
        self.transfer.commit()
        return preparation

    def observe(self, load: npt.NDArray[np.int64]) -> None:
        """Adds the load `[L, E]` of a batch that has run to the history."""
        self.history = np.concatenate([self.history, load[None]])[-HISTORY:]

    def close(self) -> None:
        """Ends the thread once what it is doing is done."""
        self._worker.close()

    def _prepare(self, upcoming: TokenBatch | None, history: LoadHistory) -> Preparation:
        times, forecast, target = [time.perf_counter()], None, self.transfer.plan
        if self.ranks.rank == 0:
            forecast = self._forecast(upcoming, history)
        times.append(time.perf_counter())
        if forecast is not None:
            target = self._plan(forecast, history)
        target = ReplicationPlan(self.ranks.broadcast(target.phy2log), target.num_devices)
        times.append(time.perf_counter())
        moves = self.transfer.start(target, forecast)
        times.append(time.perf_counter())
        spans = [1e3 * (stop - begin) for begin, stop in pairwise(times)]
        each = Counter(move.layer for move in moves)
        layer_moves = tuple(each[layer] for layer in range(len(target.phy2log)))
        return Preparation(forecast, layer_moves, self.transfer.nbytes(moves), *spans)

    def _forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast | None:
        """The forecaster's own, else one from history, else none."""
        assert self.forecaster is not None
        try:
            forecast = self.forecaster.forecast(upcoming, history)
            if forecast.share.shape != history.shape[1:]:
                raise ValueError(f"its forecast is {forecast.share.shape}, the model has {history.shape[1:]}")
            if not (forecast.load <= MOST_TOKENS).all():
                raise ValueError(f"its forecast is of {forecast.load.max()} tokens for one expert")
            return forecast
        except Exception as error:  # whatever a forecaster does, the batch must run
            self._fall_back(f"forecaster '{self.forecaster.name}'", error, "past loads take its place")
        return Ema().forecast(upcoming, history) if len(history) else None

    def _plan(self, forecast: LoadForecast, history: LoadHistory) -> ReplicationPlan:
        """The planner's, else the plan in force."""
        try:
            return self.planner.plan(forecast, self.transfer.plan, history)
        except Exception as error:  # the other ranks wait for a plan
            self._fall_back("planner", error, "the placement stays as it is")
            return self.transfer.plan

    def _fall_back(self, who: str, error: Exception, instead: str) -> None:
        reason = f"{type(error).__name__}: {error}"
        if not self.fallbacks:
            log.warning("%s failed (%s); %s", who, reason, instead)
        self.fallbacks[reason] += 1
