"""Replays recorded loads through one policy: forecast, plan, split, step after step.

Step t is forecast and planned from what is known before it; its load is split under that plan.
Shape suffixes: N steps replayed, L MoE layers, E logical experts, P slots, G devices.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.arrays import FloatArray, IntArray
from data.traces.trace import TokenBatch
from predictor.forecast import Forecaster, LoadForecast, LoadHistory
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.split import balancedness, split_by_quota, split_evenly

Split = Callable[[npt.ArrayLike, IntArray, int], IntArray]
SPLITS: dict[str, Split] = {"even": split_evenly, "quota": split_by_quota}


class Planner(Protocol):
    """Turns a forecast into a plan."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """See `runtime.balancing.planner.HomePlanner.plan`."""
        ...


@dataclass(frozen=True)
class Replay:
    """What one policy did with the loads.

    Attributes:
        forecast: Name of the forecaster; "none" where none is asked.
        planner: Name of the planner.
        split: Name of the split.
        phy2log: The plan of each step, `[N, L, P]`.
        device_load: Tokens each device computed, `[N, L, G]`.
        active: Slots with tokens on each device, `[N, L, G]`.
        arrivals: Experts that each device received before each step, over all layers, `[N, G]`.
        plan_ms: Milliseconds each plan took, all layers, `[N]`.
        split_us: Microseconds the split of a layer took, mean over the layers of each step, `[N]`.
    """

    forecast: str
    planner: str
    split: str
    phy2log: IntArray
    device_load: IntArray
    active: IntArray
    arrivals: IntArray
    plan_ms: FloatArray
    split_us: FloatArray

    @property
    def balancedness(self) -> FloatArray:
        """Mean device load over the largest, `[N, L]`."""
        return balancedness(self.device_load)

    @property
    def moves_per_layer(self) -> float:
        """Experts moved before a step, mean over steps and layers."""
        return float(self.arrivals.sum(-1).mean() / self.phy2log.shape[1])


def forecasts(
    forecaster: Forecaster, loads: IntArray, batches: list[TokenBatch] | None, start: int, stop: int
) -> Iterator[LoadForecast]:
    """Forecasts of steps start to stop, each from the loads `[steps, L, E]` before it and its own tokens."""
    for step in range(start, stop):
        yield forecaster.forecast(batches[step] if batches else None, loads[:step])


def replay(
    planner: tuple[str, Planner],
    made: Iterator[LoadForecast],
    loads: IntArray,
    first: ReplicationPlan,
    start: int,
    stop: int,
    splits: list[str],
) -> list[Replay]:
    """Replays steps start to stop of the loads `[steps, L, E]` through one planner, and each plan through the splits.

    Args:
        planner: Its name and itself.
        made: The forecast of each step.
        loads: Recorded loads.
        first: The plan in force before the first step.
        start: First step that is planned; those before it are known.
        stop: Step after the last.
        splits: Names in `SPLITS`.
    """
    name, plans = planner
    plan, source = first, "none"
    phy2log, arrivals, plan_ms = [], [], []
    loaded: dict[str, list[tuple[IntArray, IntArray, float]]] = {split: [] for split in splits}
    for step, forecast in zip(range(start, stop), made, strict=True):
        began = time.perf_counter()
        target = plans.plan(forecast, plan, loads[:step])
        plan_ms.append(1e3 * (time.perf_counter() - began))
        arrivals.append(_arrivals(plan, target))
        plan, source = target, forecast.source
        phy2log.append(plan.phy2log)
        for split in splits:
            loaded[split].append(_run(loads[step], plan, SPLITS[split]))
    return [
        Replay(
            "none" if name == "contiguous" else source,
            name,
            split,
            np.stack(phy2log),
            np.stack([load for load, _, _ in steps]),
            np.stack([active for _, active, _ in steps]),
            np.stack(arrivals),
            np.array(plan_ms),
            np.array([microseconds for _, _, microseconds in steps]),
        )
        for split, steps in loaded.items()
    ]


def _arrivals(plan: ReplicationPlan, target: ReplicationPlan) -> IntArray:
    """Experts that each device receives to get from one plan to the next, `[G]`."""
    arrives = (plan.phy2log != target.phy2log) & (target.phy2log >= 0)
    return np.asarray(arrives.reshape(len(arrives), plan.num_devices, -1).sum((0, 2)))


def _run(load_LE: IntArray, plan: ReplicationPlan, split: Split) -> tuple[IntArray, IntArray, float]:
    """Device load and active slots `[L, G]` of one step, and microseconds a layer."""
    began = time.perf_counter()
    quotas = [split(load, phy2log, plan.num_devices)[0] for load, phy2log in zip(load_LE, plan.phy2log, strict=True)]
    microseconds = 1e6 * (time.perf_counter() - began) / len(load_LE)
    blocks = np.stack(quotas).reshape(len(load_LE), plan.num_devices, -1)
    return blocks.sum(-1), (blocks > 0).sum(-1), microseconds
