"""Replays recorded loads through policies: forecast, plan and split of each step.

Step t is forecast and planned from the steps before it; its load is split under that plan. What that costs is processor
time of the thread that does it, which other work on the machine changes less than the clock.

Shape suffixes: L MoE layers, E logical experts, S source devices, G devices.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.arrays import FloatArray, IntArray
from data.traces.load_stream import LoadStream, Step
from data.traces.loads import share_of, total_variation
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, OnlineForecaster
from runtime.balancing.balancer import HISTORY
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.planner import HomePlanner, Planner
from runtime.balancing.split import split_by_quota, split_evenly
from runtime.simulate.forecasters import TrueLoad
from runtime.simulate.outcome import Outcome, Record, SplitStep, StepTimes

Split = Callable[[npt.ArrayLike, IntArray, int], IntArray]
SPLITS = ("even", "quota")


class ForecastStep(NamedTuple):
    """One step and its forecast, of the layers with tokens.

    Attributes:
        forecast: Made before the step.
        past: Loads of the steps before it, oldest first, at most `HISTORY`, `[K, L, E]`.
        load: Its load, `[L, E]`.
        milliseconds: Time the forecast took, and what was learned from the step before.
    """

    forecast: LoadForecast
    past: LoadHistory
    load: IntArray
    milliseconds: float


@dataclass(frozen=True)
class Setting:
    """How steps are replayed.

    Attributes:
        start: First step that is planned; the steps before it are history.
        stop: Step after the last.
        splits: Names in `SPLITS`.
        times: What steps cost.
        devices_per_node: Devices that share a fast network. If given, each expert's tokens are taken to come from all
            devices alike, and tokens and moves that stay within a node are counted.
        keep_plans: Whether plans and device loads are kept.
    """

    start: int
    stop: int
    splits: Sequence[str]
    times: StepTimes
    devices_per_node: int | None = None
    keep_plans: bool = False


def forecast_steps(forecaster: Forecaster, stream: LoadStream, start: int, stop: int) -> Iterator[ForecastStep]:
    """Forecasts of steps start to stop, each from the loads before it and what is known of the step's own tokens.

    The forecaster sees the last `HISTORY` loads of all layers, as in the engine. A forecaster that learns while it
    serves observes each step after its forecast.
    """
    layers, milliseconds = stream.layers, 0.0
    past, carried = (_Window(count, stream.num_experts) for count in (stream.num_layers, len(layers)))
    steps = islice(stream.steps(), stop)
    for step in islice(steps, start):
        past.add(step.load)
        carried.add(step.load[layers])
    for number, step in enumerate(steps, start):
        if isinstance(forecaster, TrueLoad):
            forecaster.load = step.load
        began = time.thread_time()
        made = forecaster.forecast(step.upcoming, past.loads)
        milliseconds += 1e3 * (time.thread_time() - began)
        kept = replace(
            made, share=made.share[layers], tokens=made.tokens[layers], spread=made.spread[layers], made_at=number
        )
        load = step.load[layers]
        yield ForecastStep(kept, carried.loads, load, milliseconds)
        milliseconds = _observed(forecaster, step)
        past.add(step.load)
        carried.add(load)


def _observed(forecaster: Forecaster, step: Step) -> float:
    """Lets a forecaster that learns observe a step; returns the milliseconds that took."""
    if not isinstance(forecaster, OnlineForecaster):
        return 0.0
    began = time.thread_time()
    forecaster.observe(step.upcoming, step.load, step.sequences)
    return 1e3 * (time.thread_time() - began)


class _Window:
    """The last `HISTORY` loads; arrays that were given out do not change."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._buffer = np.zeros((2 * HISTORY, num_layers, num_experts), dtype=np.int64)
        self._stop = 0

    @property
    def loads(self) -> IntArray:
        """Oldest first, `[K, L, E]`."""
        return self._buffer[max(0, self._stop - HISTORY) : self._stop]

    def add(self, load_LE: IntArray) -> None:
        """Adds the newest load."""
        if self._stop == len(self._buffer):
            self._buffer = np.concatenate([self.loads, np.zeros_like(self.loads)])
            self._stop = HISTORY
        self._buffer[self._stop] = load_LE
        self._stop += 1


def replay(
    forecaster: Forecaster,
    planners: Mapping[str, tuple[Planner, ReplicationPlan]],
    stream: LoadStream,
    setting: Setting,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Replays steps of a recording through planners that share a forecast, and each plan through the splits.

    Args:
        forecaster: Forecasts each step.
        planners: Planners by name, each with the plan that is active before the first step.
        stream: The recording.
        setting: Which steps, and how.
        advance: Called after each step.

    Returns:
        Outcomes of each planner, in order, and of each split.
    """
    courses = [_Course(name, planner, first, setting) for name, (planner, first) in planners.items()]
    distance, layer_steps, source = 0.0, 0, "none"
    forecast_ms: list[float] = []
    for step in forecast_steps(forecaster, stream, setting.start, setting.stop):
        for course in courses:
            course.step(step)
        carried_L = step.load.any(-1)
        distance += float(total_variation(step.forecast.share, share_of(step.load))[carried_L].sum())
        layer_steps += int(carried_L.sum())
        forecast_ms.append(step.milliseconds)
        source = step.forecast.source
        advance()
    load_tv = distance / layer_steps if layer_steps else 0.0
    return [item for course in courses for item in course.outcomes(source, load_tv, np.array(forecast_ms))]


class _Course:
    """One planner's way through the steps.

    Args:
        name: Its name.
        planner: The planner.
        first: The plan active before the first step.
        setting: How steps are replayed.
    """

    def __init__(self, name: str, planner: Planner, first: ReplicationPlan, setting: Setting) -> None:
        self.name, self.planner, self.plan, self.nodes = name, planner, first, setting.devices_per_node
        self.price = planner.expert_overhead_tokens if isinstance(planner, HomePlanner) else 0
        layers, slots = first.phy2log.shape
        shape = layers, first.num_experts, slots, first.num_devices
        counted = bool(self.nodes), setting.keep_plans
        self.records = [Record(name, split, shape, setting.times, *counted) for split in setting.splits]
        self.moves, self.far_moves = 0, 0

    def step(self, step: ForecastStep) -> None:
        """Plans and splits a step."""
        began = time.thread_time()
        target = self.planner.plan(step.forecast, self.plan, step.past)
        plan_ms = 1e3 * (time.thread_time() - began)
        arrivals_G = _arrivals(self.plan, target)
        far_G = _far_arrivals(self.plan, target, self.nodes) if self.nodes else np.zeros_like(arrivals_G)
        self.moves, self.far_moves = self.moves + int(arrivals_G.sum()), self.far_moves + int(far_G.sum())
        self.plan = target
        for record in self.records:
            split = _split_step(step.load, target, record.split, self.nodes, self.price)
            record.add(target, arrivals_G, far_G, plan_ms, split)

    def outcomes(self, source: str, load_tv: float, forecast_ms: FloatArray) -> list[Outcome]:
        """The outcome of each split, with what is known of the forecast."""
        if self.name == "contiguous":
            return [record.outcome("none") for record in self.records]
        near_moves = (self.moves - self.far_moves) / self.moves if self.nodes and self.moves else None
        known = {"near_moves": near_moves, "load_tv": load_tv, "forecast_ms": forecast_ms}
        return [record.outcome(source, **known) for record in self.records]


def _arrivals(plan: ReplicationPlan, target: ReplicationPlan) -> IntArray:
    """Experts that each device receives to get from one plan to the next, `[G]`."""
    arrives = (plan.phy2log != target.phy2log) & (target.phy2log >= 0)
    return np.asarray(arrives.reshape(len(arrives), plan.num_devices, -1).sum((0, 2)))


def _far_arrivals(plan: ReplicationPlan, target: ReplicationPlan, devices_per_node: int) -> IntArray:
    """Experts that each device receives from another node, `[G]`."""
    far = np.zeros(plan.num_devices, dtype=np.int64)
    for move in plan.moves_to(target):
        device, source = plan.device_of(move.slot), plan.device_of(move.source)
        far[device] += device // devices_per_node != source // devices_per_node
    return far


def _split_step(
    load_LE: IntArray, plan: ReplicationPlan, name: str, devices_per_node: int | None, expert_overhead_tokens: int
) -> SplitStep:
    """Splits one step's load under its plan."""
    counts_LSE = load_LE[:, None] if devices_per_node is None else _from_all_devices(load_LE, plan.num_devices)
    by_quota = partial(split_by_quota, devices_per_node=devices_per_node, expert_overhead_tokens=expert_overhead_tokens)
    split: Split = split_evenly if name == "even" else by_quota
    began = time.thread_time()
    layers = zip(counts_LSE, plan.phy2log, strict=True)
    quotas = [split(counts, phy2log, plan.num_devices) for counts, phy2log in layers]
    microseconds = 1e6 * (time.thread_time() - began) / len(load_LE)
    by_device = np.stack(quotas).reshape(len(load_LE), counts_LSE.shape[1], plan.num_devices, -1)
    near = 0
    if devices_per_node:
        node = np.arange(plan.num_devices) // devices_per_node
        near = int(by_device.sum((0, 3))[node[:, None] == node].sum())
    slots = by_device.sum(1)
    return SplitStep(slots.sum(-1), (slots > 0).sum(-1), microseconds, near)


def _from_all_devices(load_LE: IntArray, num_devices: int) -> IntArray:
    """Counts `[L, G, E]` if every device sends as many tokens to each expert as every other, give or take one.

    Where the odd tokens come from shifts with the expert: loads [3, 3] on 2 devices are [2, 1] and [1, 2].
    """
    each, odd = np.divmod(load_LE[:, None], num_devices)
    turn = (np.arange(num_devices)[:, None] - np.arange(load_LE.shape[1])) % num_devices
    return np.asarray(each + (turn < odd))
