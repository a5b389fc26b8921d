"""Controller: forecasts, plans and moves for the batch that comes next while the current one runs.

A forecaster that raises, or whose forecast does not fit the model, is replaced by the average of past loads, and where
there are none the placement stays as it is; the model's answers do not depend on any of it.
"""

import logging
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.trace import TokenBatch
from predictor.baselines import Ema
from predictor.forecast import Forecaster, LoadForecast, LoadHistory
from runtime.plan import ReplicationPlan
from runtime.transfer import SlotTransfer

HISTORY = 64  # batches
log = logging.getLogger(__name__)


class Planner(Protocol):
    """Turns a forecast into a plan, given the plan in force and the loads of the last batches."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.planner`."""
        ...


@dataclass(frozen=True)
class Preparation:
    """What was done ahead of a batch.

    Attributes:
        forecast: The forecast it rests on; None where there was nothing to forecast from.
        moves: Experts moved.
        nbytes: Bytes they weigh.
        forecast_ms: Milliseconds the forecast took.
        plan_ms: Milliseconds the plan took.
        move_ms: Milliseconds the moves took to issue (on CPU: to copy).
    """

    forecast: LoadForecast | None
    moves: int
    nbytes: int
    forecast_ms: float
    plan_ms: float
    move_ms: float


class Controller:
    """Prepares the placement of the next batch on a thread of its own.

    Args:
        forecaster: What forecasts; None never replicates.
        planner: What plans.
        transfer: What moves; it knows the plan in force.
    """

    def __init__(self, forecaster: Forecaster | None, planner: Planner, transfer: SlotTransfer) -> None:
        self.forecaster, self.planner, self.transfer = forecaster, planner, transfer
        layers, experts = transfer.plan.phy2log.shape[0], transfer.plan.num_experts
        self.history: npt.NDArray[np.int64] = np.zeros((0, layers, experts), dtype=np.int64)
        self.fallbacks: Counter[str] = Counter()
        self.late = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="switchcast-controller")
        self._future: Future[Preparation] | None = None

    def prepare(self, upcoming: TokenBatch | None) -> None:
        """Starts preparing for a batch, unless an earlier preparation is still under way."""
        if self.forecaster is not None and self._future is None:
            self._future = self._thread.submit(self._prepare, upcoming, self.history)

    def commit(self, wait: bool = False) -> Preparation | None:
        """Between batches: puts what was prepared in force if it is ready, else leaves it for the next boundary."""
        if self._future is None:
            return None
        if not wait and not (self._future.done() and self.transfer.arrived):
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
        self._thread.shutdown(wait=True)

    def _prepare(self, upcoming: TokenBatch | None, history: LoadHistory) -> Preparation:
        start = time.perf_counter()
        forecast = self._forecast(upcoming, history)
        forecasted = time.perf_counter()
        current = self.transfer.plan
        target = current if forecast is None else self.planner.plan(forecast, current, history)
        planned = time.perf_counter()
        moves = self.transfer.start(target)
        moved = time.perf_counter()
        times = [1e3 * (stop - begin) for begin, stop in ((start, forecasted), (forecasted, planned), (planned, moved))]
        return Preparation(forecast, len(moves), self.transfer.nbytes(moves), *times)

    def _forecast(self, upcoming: TokenBatch | None, history: LoadHistory) -> LoadForecast | None:
        """The forecaster's own, else one from history, else none."""
        assert self.forecaster is not None
        try:
            forecast = self.forecaster.forecast(upcoming, history)
            if forecast.share.shape != history.shape[1:]:
                raise ValueError(f"its forecast is {forecast.share.shape}, the model has {history.shape[1:]}")
            return forecast
        except Exception as error:  # whatever a forecaster does, the batch must run
            reason = f"{type(error).__name__}: {error}"
            if not self.fallbacks:
                log.warning("forecaster '%s' failed (%s); falling back on past loads", self.forecaster.name, reason)
            self.fallbacks[reason] += 1
        return Ema().forecast(upcoming, history) if len(history) else None
