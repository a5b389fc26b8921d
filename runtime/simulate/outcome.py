"""Outcome: what one policy did with recorded loads, step by step; and its record, which is written while it happens.

Of each step a few sums over layers and devices are kept, so that millions of steps fit memory.

Shape suffixes: N steps replayed, L MoE layers with tokens, P slots, G devices.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from data.arrays import FloatArray, IntArray
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.split import balancedness

BLOCK = 64
"""Steps whose times are computed together."""
BINS = 100_000
"""Bins between 0 and 1 by which balancedness is counted for its quantiles."""
COLUMNS = (
    "balance", "carrying", "mean_load", "largest_load", "arrivals", "seconds", "move_seconds", "plan_ms", "split_us"
)  # fmt: skip
"""Attributes of an outcome with one number for each step, in the order in which `Record` keeps them."""


class StepTimes(Protocol):
    """Seconds that steps take on some hardware; see `runtime.simulate.cost_model.DeviceTimes`."""

    def layer_seconds(self, device_load: IntArray, active: IntArray) -> FloatArray:
        """Expert time `[N, L]`, from tokens and active slots of each device `[N, L, G]`."""

    def move_seconds(self, arrivals: IntArray, far_arrivals: IntArray) -> FloatArray:
        """Time `[N]` in which devices receive `[N, G]` experts, some of them from other nodes, `[N, G]`."""


@dataclass(frozen=True)
class Outcome:
    """What one policy did with the loads.

    Attributes:
        forecast: Name of the forecaster; "none" for the contiguous planner, which uses no forecast.
        planner: Name of the planner.
        split: Name of the split.
        shape: Layers, experts of a layer, slots of a layer, devices.
        balance: Mean device load over the largest, mean over the layers with tokens in a step, `[N]`.
        carrying: Layers with tokens in each step, `[N]`.
        mean_load: Mean device load, sum over layers, `[N]`.
        largest_load: Largest device load, sum over layers, `[N]`.
        arrivals: Experts moved before each step, all layers, `[N]`.
        seconds: Expert time of each step, `[N]`.
        move_seconds: Time in which the experts move before each step, `[N]`.
        plan_ms: Processor time of each plan, all layers, milliseconds, `[N]`.
        split_us: Processor time of the split of a layer, mean over the layers of each step, microseconds, `[N]`.
        p05: 5th percentile of mean device load over the largest, over all steps and layers with tokens.
        forecast_ms: Processor time of each forecast, milliseconds, `[N]`; None for the contiguous planner.
        near_moves: Share of all moves whose expert has its home on the same node; None without nodes or moves.
        near_tokens: Share of all tokens computed on the node they come from; None without nodes or tokens.
        load_tv: Total variation distance (0 to 1) of forecast and true shares, mean over steps and layers; None for the
            contiguous planner.
        phy2log: The plan of each step, `[N, L, P]`, if plans are to be saved.
        home_slots: Home slot of each expert in each step, `[N, L, E]`, likewise; None where every plan's homes are the
            first E / G slots of each device, or the plans have none.
        device_load: Tokens each device computed, `[N, L, G]`, likewise.
    """

    forecast: str
    planner: str
    split: str
    shape: tuple[int, int, int, int]
    balance: FloatArray
    carrying: IntArray
    mean_load: FloatArray
    largest_load: IntArray
    arrivals: IntArray
    seconds: FloatArray
    move_seconds: FloatArray
    plan_ms: FloatArray
    split_us: FloatArray
    p05: float
    forecast_ms: FloatArray | None = None
    near_moves: float | None = None
    near_tokens: float | None = None
    load_tv: float | None = None
    phy2log: IntArray | None = None
    home_slots: IntArray | None = None
    device_load: IntArray | None = None

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.balance)

    @property
    def mean_balancedness(self) -> float:
        """Mean device load over the largest, mean over the steps and layers with tokens."""
        return self.balancedness_from(0)

    def balancedness_from(self, first: int) -> float:
        """The same, over the steps from `first` on."""
        return float(np.average(self.balance[first:], weights=self.carrying[first:]))

    @property
    def moves_per_layer(self) -> float:
        """Experts moved before a step, mean over steps and layers."""
        return float(self.arrivals.mean() / self.shape[0])


class SplitStep(NamedTuple):
    """One step's split: device load and active slots `[L, G]`, microseconds a layer, tokens that stay on their node."""

    device_load: IntArray
    active: IntArray
    microseconds: float
    near_tokens: int


@dataclass
class Record:
    """What one policy does, while it is replayed.

    Attributes:
        planner: Name of the planner.
        split: Name of the split.
        shape: Layers, experts of a layer, slots of a layer, devices.
        times: What steps cost.
        nodes: Whether tokens that stay on their node are counted.
        keep: Whether plans and device loads are kept.
    """

    planner: str
    split: str
    shape: tuple[int, int, int, int]
    times: StepTimes
    nodes: bool = False
    keep: bool = False
    _sums: list[FloatArray] = field(default_factory=list)
    _block: list[tuple[ReplicationPlan, IntArray, IntArray, float, SplitStep]] = field(default_factory=list)
    _kept: list[tuple[ReplicationPlan, IntArray]] = field(default_factory=list)
    _bins: IntArray = field(default_factory=lambda: np.zeros(BINS + 1, dtype=np.int64))
    _near_tokens: int = 0
    _tokens: int = 0

    def add(
        self, plan: ReplicationPlan, arrivals_G: IntArray, far_arrivals_G: IntArray, plan_ms: float, step: SplitStep
    ) -> None:
        """Adds a step.

        Args:
            plan: The plan that it ran with.
            arrivals_G: Experts that each device received before it.
            far_arrivals_G: Those of them that came from another node.
            plan_ms: Milliseconds that the plan took.
            step: How its tokens were split.
        """
        self._block.append((plan, arrivals_G, far_arrivals_G, plan_ms, step))
        if len(self._block) == BLOCK:
            self._sum_up()

    def outcome(self, forecast: str, **more: Any) -> Outcome:
        """The outcome of all steps.

        Args:
            forecast: Name of the forecaster.
            more: Further attributes of the outcome.
        """
        self._sum_up()
        sums = np.concatenate(self._sums, axis=1)
        if self.keep:
            plans, device_load = zip(*self._kept, strict=True)
            more |= {"phy2log": np.stack([plan.phy2log for plan in plans]), "device_load": np.stack(device_load)}
            if any(plan.home_slots is not None for plan in plans):
                more["home_slots"] = np.stack([plan.homes for plan in plans])
        whole = {"carrying", "largest_load", "arrivals"}
        columns = {
            name: column.astype(np.int64) if name in whole else column
            for name, column in zip(COLUMNS, sums, strict=True)
        }
        if self.nodes and self._tokens:
            more["near_tokens"] = self._near_tokens / self._tokens
        p05 = self._quantile(0.05)
        return Outcome(forecast, self.planner, self.split, self.shape, **columns, p05=p05, **more)

    def _sum_up(self) -> None:
        """Turns the steps of a block into sums."""
        if not self._block:
            return
        plans, arrivals, far_arrivals, plan_ms, steps = zip(*self._block, strict=True)
        device_load, active, microseconds, near = (np.array(each) for each in zip(*steps, strict=True))
        received = np.array(arrivals)
        balance = balancedness(device_load)
        known = np.isfinite(balance)
        carrying = known.sum(-1)
        seconds = self.times.layer_seconds(device_load, active).sum(-1)
        move_seconds = self.times.move_seconds(received, np.array(far_arrivals))
        block = (
            np.nansum(balance, -1) / np.maximum(carrying, 1), carrying, device_load.mean(-1).sum(-1),
            device_load.max(-1).sum(-1), received.sum(-1), seconds, move_seconds, plan_ms, microseconds,
        )  # fmt: skip
        self._sums.append(np.array(block, dtype=np.float64))
        np.add.at(self._bins, np.rint(balance[known] * BINS).astype(np.int64), 1)
        self._near_tokens, self._tokens = self._near_tokens + int(near.sum()), self._tokens + int(device_load.sum())
        if self.keep:
            self._kept += list(zip(plans, device_load, strict=True))
        self._block.clear()

    def _quantile(self, share: float) -> float:
        """A quantile of balancedness, between the values of its two neighbours, to the width of a bin."""
        below = np.cumsum(self._bins)
        place = share * (below[-1] - 1)
        lower, upper = (
            np.searchsorted(below, number, side="right") / BINS for number in (np.floor(place), np.ceil(place))
        )
        return float(lower + (upper - lower) * (place % 1))
