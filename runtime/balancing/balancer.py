"""Balancer: expert replication for any engine. Give it each batch's load, and it returns the plan for the next batch.

It holds the active plan and the load history, and joins a forecaster, a planner and the token split.

Shape suffixes: K past batches, L MoE layers, E logical experts, S source devices, P slots, G devices.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data.arrays import IntArray
from predictor.baselines.history import FREE, RunningMean
from predictor.forecast import Forecaster, LoadForecast, LoadHistory, OnlineForecaster
from runtime.balancing.node_rows import NodeRows
from runtime.balancing.nodes import check_groups
from runtime.balancing.plan import ReplicationPlan, SlotMove, flat_homes
from runtime.balancing.planner import HomePlanner, Planner
from runtime.balancing.split import check_total, split_by_quota

if TYPE_CHECKING:  # planning needs no torch
    from data.traces.trace import TokenBatch

HISTORY = 64
"""Past batches that are kept."""
FORECASTERS: dict[str, Forecaster] = FREE | {"mean": RunningMean()}
"""Forecasters that need the load history alone."""


class Balancer:
    """Plans replicas batch after batch from the loads that it is given.

    Example, with 8 devices and one hot expert among 32:
        >>> from runtime.balancing.split import device_load
        >>> loads = np.full((5, 1, 32), 20)    # [batches, layers, experts], int64
        >>> loads[:, 0, 3] = 400
        >>> balancer = Balancer(num_devices=8, num_redundant_experts=8)
        >>> for load in loads:
        ...     plan = balancer.step(load)     # for the next batch; balancer.moves says which weights to copy
        >>> int(plan.replica_count[0, 3]) > 1
        True
        >>> quota = split_by_quota(loads[-1, 0], plan.phy2log[0], 8)
        >>> int(device_load(quota, 8).max()), loads[-1, 0].sum() / 8
        (128, np.float64(127.5))

    Args:
        num_devices: G.
        num_redundant_experts: R, replica slots a layer over all devices.
        forecaster: "last", "mean" or "ema" (of past loads), or any `Forecaster`.
        planner: Any `Planner`; by default a `HomePlanner` with the limits below.
        homes: As `ReplicationPlan.at_home` takes them, `[L, E]` or `[L, P]`; by default chosen so that the first load
            is flat.
        max_moves: Most experts moved before a batch, over all layers; None moves as many as pay.
        devices_per_node: Devices that share a fast network; the planner prefers copies within a node, and `split`
            keeps tokens there. None means one node.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights, for the
            default planner and `split`; with 0 they balance tokens alone.
        num_groups: Groups of consecutive experts that stay on one node, copies included, for routers that choose groups
            first (group-limited routing); needs `devices_per_node`.

    Raises:
        ValueError: If experts and redundant experts do not divide over the devices, experts, groups and nodes do not go
            together, or an option is unknown.
    """

    def __init__(
        self,
        num_devices: int,
        num_redundant_experts: int = 0,
        forecaster: str | Forecaster = "ema",
        *,
        planner: Planner | None = None,
        homes: IntArray | None = None,
        max_moves: int | None = None,
        devices_per_node: int | None = None,
        expert_overhead_tokens: int = 0,
        num_groups: int | None = None,
    ) -> None:
        if isinstance(forecaster, str) and forecaster not in FORECASTERS:
            raise ValueError(
                f"forecaster is '{forecaster}', expected {', '.join(FORECASTERS)} or an object with a method `forecast`"
            )
        if planner is not None and max_moves is not None:
            raise ValueError("max_moves is an option of the default planner; give it to your planner instead")
        check_groups(num_groups, num_devices, devices_per_node)
        self.num_devices, self.num_redundant_experts = num_devices, num_redundant_experts
        self.devices_per_node, self.num_groups = devices_per_node, num_groups
        self.expert_overhead_tokens = expert_overhead_tokens
        self.forecaster = FORECASTERS[forecaster] if isinstance(forecaster, str) else forecaster
        self.planner = planner or HomePlanner(
            num_devices, num_redundant_experts, max_moves, devices_per_node,
            expert_overhead_tokens=expert_overhead_tokens, num_groups=num_groups,
        )  # fmt: skip
        self.moves: list[SlotMove] = []
        """Weights to copy to get from the plan before to the current one."""
        self._plan: ReplicationPlan | None = None
        self._history: LoadHistory = np.zeros((0, 0, 0), dtype=np.int64)
        self._upcoming: TokenBatch | None = None
        if homes is not None:
            self._begin(np.asarray(homes))

    @property
    def plan(self) -> ReplicationPlan:
        """The current plan; before the first change every expert is at home and the replica slots are empty.

        Raises:
            ValueError: If no load was given yet and no homes.
        """
        if self._plan is None:
            raise ValueError("there is no plan yet: call step or observe with a first load, or give homes")
        return self._plan

    @property
    def history(self) -> LoadHistory:
        """Loads of the last batches, oldest first, at most `HISTORY`, `[K, L, E]`."""
        return self._history

    def step(self, load: npt.ArrayLike, upcoming: "TokenBatch | None" = None) -> ReplicationPlan:
        """Adds the load of the batch that ran to the history, and plans the next batch.

        A forecaster that learns while it serves observes the load, and the tokens that it was given for that batch.

        Args:
            load: Tokens of each expert, `[L, E]`: whole numbers, as a numpy array, torch tensor or lists.
            upcoming: The next batch's tokens, for a forecaster that reads them.
        """
        self.observe(load)
        self._upcoming = upcoming
        return self.plan_for(self.forecaster.forecast(upcoming, self._history))

    def observe(self, load: npt.ArrayLike) -> None:
        """Adds the load `[L, E]` of a batch that ran to the history.

        Raises:
            ValueError: If it is not a load, or of another shape than the plan.
        """
        array = _whole_tokens(load)
        if self._plan is None:
            homes = flat_homes(
                array.astype(np.float64), self.num_devices, self.num_redundant_experts, num_groups=self.num_groups,
                devices_per_node=self.devices_per_node,
            )  # fmt: skip
            self._begin(homes)
        expected = (len(self.plan.phy2log), self.plan.num_experts)
        if array.shape != expected:
            raise ValueError(f"the load has shape {array.shape}, the plan is for {expected} layers and experts")
        self._history = np.concatenate([self._history, array[None]])[-HISTORY:]
        if isinstance(self.forecaster, OnlineForecaster):
            self.forecaster.observe(self._upcoming, array)
        self._upcoming = None

    def plan_for(self, forecast: LoadForecast, recent: LoadHistory | None = None) -> ReplicationPlan:
        """Plans the batch of a forecast and makes that plan the current one.

        Args:
            forecast: Of the coming batch, `[L, E]`.
            recent: Loads of the last batches, oldest first, `[K, L, E]`; by default the balancer's own history.
        """
        before = self.plan
        self._plan = self.planner.plan(forecast, before, self._history if recent is None else recent)
        self.moves = before.moves_to(self._plan)
        return self._plan

    def split(self, layer: int, counts: npt.ArrayLike) -> IntArray:
        """Quotas `[S, P]` of a layer under the current plan; counts as in `split_by_quota`."""
        phy2log = self.plan.phy2log[layer]
        return split_by_quota(
            _array(counts), phy2log, self.num_devices, devices_per_node=self.devices_per_node,
            expert_overhead_tokens=self.expert_overhead_tokens,
        )  # fmt: skip

    def _begin(self, homes: IntArray) -> None:
        self._plan = ReplicationPlan.at_home(homes, self.num_devices, self.num_redundant_experts)
        if self.num_groups is not None and self.devices_per_node is not None:
            NodeRows.of(self._plan, self.num_groups, self.devices_per_node)  # refuses homes that part a group
        self._history = np.zeros((0, len(homes), self._plan.num_experts), dtype=np.int64)


def _array(values: Any) -> npt.NDArray[Any]:
    """A numpy array of what may be a torch tensor on any device."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def _whole_tokens(load: npt.ArrayLike) -> IntArray:
    """A load as int64 `[L, E]`, refused unless it holds whole tokens.

    Raises:
        ValueError: Naming what was found and what was expected.
    """
    array = _array(load)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"the load has shape {array.shape}, expected [layers, experts] with at least one of each")
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all() or (array != np.round(array)).any():
        raise ValueError(f"the load ({array.dtype}) is not whole numbers of tokens; give the counts of one batch")
    if array.min() < 0:
        raise ValueError(f"the load holds {array.min()}; tokens cannot be negative")
    check_total(array)
    return array.astype(np.int64)


def compile_kernels() -> None:
    """Compiles the kernels of planner and split and caches them on disk: some 20 seconds once, none afterwards."""
    balancer = Balancer(2, 2, "last")
    for load in np.arange(1, 13).reshape(3, 1, 4):
        balancer.step(load)
        balancer.split(0, load[0])
