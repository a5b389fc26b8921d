"""Replays recorded loads through one policy: forecast, plan and split of each step.

Step t is forecast and planned from the steps before it; its load is split under that plan.

Shape suffixes: N steps replayed, L MoE layers, E logical experts, S source devices, P slots, G devices.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from data.arrays import FloatArray, IntArray
from data.traces.loads import RecordedLoads, share_of, total_variation
from predictor.forecast import Forecaster, LoadForecast, OnlineForecaster
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.planner import Planner
from runtime.balancing.split import balancedness, mean_balancedness, split_by_quota, split_evenly

Split = Callable[[npt.ArrayLike, IntArray, int], IntArray]
SPLITS = ("even", "quota")


@dataclass(frozen=True)
class Replay:
    """What one policy did with the loads.

    Attributes:
        forecast: Name of the forecaster; "none" for the contiguous planner, which uses no forecast.
        planner: Name of the planner.
        split: Name of the split.
        phy2log: The plan of each step, `[N, L, P]`.
        device_load: Tokens each device computed, `[N, L, G]`.
        active: Slots with tokens on each device, `[N, L, G]`.
        arrivals: Experts that each device received before each step, over all layers, `[N, G]`.
        plan_ms: Milliseconds each plan took, all layers, `[N]`.
        split_us: Microseconds the split of a layer took, mean over the layers of each step, `[N]`.
        near_moves: Share of all moves whose expert has its home on the same node; None without nodes or moves.
        near_tokens: Share of all tokens computed on the node they come from; None without nodes or tokens.
        forecast_ms: Milliseconds a forecast took, mean over steps.
        load_tv: Total variation distance (0 to 1) of forecast and true shares, mean over steps and layers; None for the
            contiguous planner.
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
    near_moves: float | None = None
    near_tokens: float | None = None
    load_tv: float | None = None
    forecast_ms: float = 0.0

    @property
    def balancedness(self) -> FloatArray:
        """Mean device load over the largest, `[N, L]`; NaN where a layer has no tokens in a step."""
        return balancedness(self.device_load)

    @property
    def mean_balancedness(self) -> float:
        """Mean of `balancedness` over the steps and layers with tokens."""
        return mean_balancedness(self.device_load)

    @property
    def moves_per_layer(self) -> float:
        """Experts moved before a step, mean over steps and layers."""
        return float(self.arrivals.sum(-1).mean() / self.phy2log.shape[1])


def forecast_steps(forecaster: Forecaster, recorded: RecordedLoads, start: int, stop: int) -> Iterator[LoadForecast]:
    """Forecasts of steps start to stop, each from the loads before it and what is known of the step's own tokens.

    The forecaster sees the loads of all layers; of its forecast the layers with tokens are kept. A forecaster that
    learns while it serves observes each step after its forecast.
    """
    loads, batches, sequences, layers = recorded.loads, recorded.batches, recorded.sequences, recorded.layers
    for step in range(start, stop):
        upcoming = batches[step] if batches else None
        made = forecaster.forecast(upcoming, loads[:step])
        yield replace(made, share=made.share[layers], tokens=made.tokens[layers], spread=made.spread[layers])
        if isinstance(forecaster, OnlineForecaster):
            forecaster.observe(upcoming, loads[step], sequences[step] if sequences else None)


def forecast_error(made: list[LoadForecast], loads: IntArray) -> float:
    """Total variation distance of forecast shares and those of the loads `[N, L, E]`, mean over layers with load."""
    distance = total_variation(np.stack([forecast.share for forecast in made]), share_of(loads))
    carried = loads.sum(-1) > 0
    return float(distance[carried].mean()) if carried.any() else 0.0


def replay(
    planner: tuple[str, Planner],
    made: Iterator[LoadForecast],
    loads: IntArray,
    first: ReplicationPlan,
    start: int,
    stop: int,
    splits: list[str],
    devices_per_node: int | None = None,
) -> list[Replay]:
    """Replays steps start to stop of the loads `[steps, L, E]` through one planner, and each plan through the splits.

    Args:
        planner: Its name and the planner.
        made: The forecast of each step.
        loads: Recorded loads.
        first: The plan active before the first step.
        start: First step that is planned; the steps before it are history.
        stop: Step after the last.
        splits: Names in `SPLITS`.
        devices_per_node: Devices that share a fast network. If given, each expert's tokens are taken to come from all
            devices alike, and tokens and moves that stay within a node are counted.
    """
    name, plans = planner
    plan, source = first, "none"
    phy2log, arrivals, plan_ms, moves = [], [], [], []
    steps: dict[str, list[_SplitStep]] = {split: [] for split in splits}
    for step, forecast in zip(range(start, stop), made, strict=True):
        began = time.perf_counter()
        target = plans.plan(forecast, plan, loads[:step])
        plan_ms.append(1e3 * (time.perf_counter() - began))
        arrivals.append(_arrivals(plan, target))
        if devices_per_node:
            moves += [(plan.device_of(move.slot), plan.device_of(move.source)) for move in plan.moves_to(target)]
        plan, source = target, forecast.source
        phy2log.append(plan.phy2log)
        for split in splits:
            steps[split].append(_split_step(loads[step], plan, split, devices_per_node))
    node = devices_per_node or first.num_devices
    near_moves = float(np.mean([device // node == home // node for device, home in moves])) if moves else None
    return [
        Replay(
            "none" if name == "contiguous" else source,
            name,
            split,
            np.stack(phy2log),
            np.stack([step.device_load for step in made_steps]),
            np.stack([step.active for step in made_steps]),
            np.stack(arrivals),
            np.array(plan_ms),
            np.array([step.microseconds for step in made_steps]),
            near_moves,
            _near_tokens(made_steps) if devices_per_node else None,
        )
        for split, made_steps in steps.items()
    ]


@dataclass(frozen=True)
class _SplitStep:
    """One step's split: device load and active slots `[L, G]`, microseconds a layer, tokens that stay on their node."""

    device_load: IntArray
    active: IntArray
    microseconds: float
    near_tokens: int


def _arrivals(plan: ReplicationPlan, target: ReplicationPlan) -> IntArray:
    """Experts that each device receives to get from one plan to the next, `[G]`."""
    arrives = (plan.phy2log != target.phy2log) & (target.phy2log >= 0)
    return np.asarray(arrives.reshape(len(arrives), plan.num_devices, -1).sum((0, 2)))


def _split_step(load_LE: IntArray, plan: ReplicationPlan, name: str, devices_per_node: int | None) -> _SplitStep:
    """Splits one step's load under its plan."""
    counts_LSE = load_LE[:, None] if devices_per_node is None else _from_all_devices(load_LE, plan.num_devices)
    split: Split = split_evenly if name == "even" else partial(split_by_quota, devices_per_node=devices_per_node)
    began = time.perf_counter()
    layers = zip(counts_LSE, plan.phy2log, strict=True)
    quotas = [split(counts, phy2log, plan.num_devices) for counts, phy2log in layers]
    microseconds = 1e6 * (time.perf_counter() - began) / len(load_LE)
    by_device = np.stack(quotas).reshape(len(load_LE), counts_LSE.shape[1], plan.num_devices, -1)
    near = 0
    if devices_per_node:
        node = np.arange(plan.num_devices) // devices_per_node
        near = int(by_device.sum((0, 3))[node[:, None] == node].sum())
    slots = by_device.sum(1)
    return _SplitStep(slots.sum(-1), (slots > 0).sum(-1), microseconds, near)


def _from_all_devices(load_LE: IntArray, num_devices: int) -> IntArray:
    """Counts `[L, G, E]` if every device sends as many tokens to each expert as every other, give or take one.

    Where the odd tokens come from shifts with the expert: loads [3, 3] on 2 devices are [2, 1] and [1, 2].
    """
    each, odd = np.divmod(load_LE[:, None], num_devices)
    turn = (np.arange(num_devices)[:, None] - np.arange(load_LE.shape[1])) % num_devices
    return np.asarray(each + (turn < odd))


def _near_tokens(steps: list[_SplitStep]) -> float | None:
    tokens = sum(int(step.device_load.sum()) for step in steps)
    return sum(step.near_tokens for step in steps) / tokens if tokens else None
