"""HomePlanner: from a load forecast to the plan for the coming batch. Replicas change where that pays; homes may too.

`Planner` is the protocol that the engine, `Balancer` and the simulator ask for.

Shape suffixes: K recent loads, L MoE layers, E logical experts, R redundant experts, P slots, G devices.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from data.arrays import BoolArray, Float32Array, FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing import local_search, moving_homes
from runtime.balancing.node_rows import NodeRows
from runtime.balancing.nodes import check_groups
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.scenarios import scenarios

LEAST_GAIN = 0.001
"""Overload that a move must save, in units of the mean device load."""
HORIZON = 16.0
"""Batches a replica is expected to serve; a move that delays a device must pay for itself within them."""
BETWEEN_NODES = 4.0
"""Price of a move between nodes, relative to a move within one, where their times are not known."""
SEVERAL = 4
"""Experts a device from which on the time of an expert's weights is treated as divisible."""

log = logging.getLogger(__name__)


class Planner(Protocol):
    """Turns a forecast into a plan."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """The plan for the coming batch.

        Args:
            forecast: Of the coming batch's load, `[L, E]`; its spread is the standard deviation of its errors.
            current: The plan now active.
            recent: Loads of the last batches, oldest first, `[K, L, E]`; K may be 0.
        """
        ...


@dataclass(frozen=True)
class HomePlanner:
    """Chooses replicas so that the load after an optimal split is flattest, over the scenarios of a forecast.

    It has no state: the same forecast, plan and loads give the same plan. Processors of different types may round
    differently, so in an engine of several ranks one rank plans and broadcasts the plan.

    Attributes:
        num_devices: G.
        num_redundant_experts: R, replica slots a layer over all devices, R / G on each.
        max_moves: Most experts moved before a batch, over all layers (a budget in bytes divided by the bytes of an
            expert); None moves as many as pay. The layers that gain most for a move come first.
        devices_per_node: Devices that share a fast network; a copy from another node must save `between_nodes` times
            as much. None means one node.
        move_tokens: Tokens a device computes in the time that a move delays it; 0 where moves are hidden.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights, as the
            split counts it. With a price, device times are balanced; with 0, tokens alone.
        moving_homes: Whether homes may move. It helps where there are fewer replica slots than devices, in engines that
            copy weights from any slot that holds an expert. Switchcast's own engine copies them from fixed homes and
            refuses it.
        num_groups: Groups of consecutive experts that stay on one node, copies included, for routers that choose groups
            first (group-limited routing). Needs `devices_per_node`, and homes by groups, as `flat_homes` chooses them.
        between_nodes: Time of a move between nodes, relative to a move within one, 1 or more.
    """

    num_devices: int
    num_redundant_experts: int
    max_moves: int | None = None
    devices_per_node: int | None = None
    move_tokens: float = 0.0
    expert_overhead_tokens: int = 0
    moving_homes: bool = False
    num_groups: int | None = None
    between_nodes: float = BETWEEN_NODES

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.num_redundant_experts < 0:
            raise ValueError(
                f"{self.num_devices} devices and {self.num_redundant_experts} redundant experts: expected at least 1 "
                "device, and 0 or more redundant experts"
            )
        check_groups(self.num_groups, self.num_devices, self.devices_per_node)
        if self.max_moves is not None and self.max_moves < 0:
            raise ValueError(f"max_moves is {self.max_moves}, expected 0 or more; leave it out for no limit")
        if not 0 <= self.move_tokens < float("inf"):
            raise ValueError(f"move_tokens is {self.move_tokens}, expected a finite number, 0 or more")
        if self.expert_overhead_tokens < 0:
            raise ValueError(f"expert_overhead_tokens is {self.expert_overhead_tokens}, expected 0 or more")
        if not 1 <= self.between_nodes < float("inf"):
            raise ValueError(f"between_nodes is {self.between_nodes}, expected a finite number, 1 or more")

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """The plan for the coming batch, with the homes of the current one unless homes move.

        Raises:
            ValueError: If forecast, plan and loads are not of the same model and devices, or the plan has copies of a
                group on several nodes.
        """
        self._check(forecast, current, recent)
        if self.max_moves == 0 or (self.num_redundant_experts == 0 and not self.moving_homes):
            return current
        shares, weights = scenarios(forecast, recent)
        load, waking = self._device_time(shares, forecast.tokens)
        price = self._price(forecast.tokens)
        if self.num_groups is None or self.devices_per_node is None:
            return self._improved(current, load, waking, weights, price)
        nodes = NodeRows.of(current, self.num_groups, self.devices_per_node)
        return nodes.joined(self._improved(nodes.rows, *nodes.divided(load, waking, weights, price)))

    def _improved(
        self,
        current: ReplicationPlan,
        load: Float32Array,
        waking: Float32Array,
        weights: Float32Array,
        price: Float32Array,
    ) -> ReplicationPlan:
        """The plan for loads in scenarios; arguments as in `local_search.improve`."""
        devices, factor = current.num_devices, self._factor(current.num_devices)
        if self.moving_homes:
            return self._with_moved_homes(current, load, waking, weights, price, factor)
        layers, slots = len(current.phy2log), current.slots_per_device
        replica_LP = ~current.is_home_slot
        held = current.phy2log[replica_LP].reshape(layers, -1)
        first = np.zeros((layers, devices + 1), dtype=np.int64)
        first[:, 1:] = replica_LP.reshape(layers, devices, slots).sum(-1).cumsum(-1)
        limit = current.num_redundant_experts
        if self.max_moves is not None:
            limit = min(limit, self.max_moves)
        _announce_compiling(local_search)
        wanted, gain = local_search.improve(
            held, first, current.homes // slots, load, waking, weights, price, factor, limit
        )
        phy2log = current.phy2log.copy()
        changed = self._within_budget((held != wanted).sum(-1), gain)
        phy2log[replica_LP] = np.where(changed[:, None], wanted, held).ravel()
        return current.with_slots(phy2log)

    def _with_moved_homes(
        self,
        current: ReplicationPlan,
        load_LEK: Float32Array,
        waking_LK: Float32Array,
        weight_K: Float32Array,
        price_L: Float32Array,
        factor_GG: Float32Array,
    ) -> ReplicationPlan:
        """The plan in which any slot may change; arguments as in `moving_homes.improve`."""
        layers, slots = current.phy2log.shape
        replica = np.nonzero(~current.is_home_slot)[1].reshape(layers, -1)
        limit = slots if self.max_moves is None else min(slots, self.max_moves)
        _announce_compiling(moving_homes)
        phy2log, homes, gain = moving_homes.improve(
            current.phy2log, current.homes, replica, current.num_devices, load_LEK, waking_LK, weight_K, price_L,
            factor_GG, limit,
        )  # fmt: skip
        changed = self._within_budget((phy2log != current.phy2log).sum(-1), gain)[:, None]
        phy2log, homes = np.where(changed, phy2log, current.phy2log), np.where(changed, homes, current.homes)
        if (homes == current.homes).all():
            return current.with_slots(phy2log)
        return ReplicationPlan(phy2log, current.num_devices, homes)

    def _device_time(self, shares_LEK: Float32Array, tokens_L: FloatArray) -> tuple[Float32Array, Float32Array]:
        """Time of each expert's tokens `[L, E, K]` and of an active slot's weights `[L, K]`.

        Both are in units of the mean device time with every expert that has tokens active once. Where devices have
        several experts, an expert's tokens include the time of its weights, because moving whole experts can then
        balance nearly as well as dividing them.
        """
        if self.expert_overhead_tokens == 0:
            waking = np.zeros((len(shares_LEK), shares_LEK.shape[2]), dtype=np.float32)
            return shares_LEK * np.float32(self.num_devices), waking
        counts = np.rint(shares_LEK * tokens_L.astype(np.float32)[:, None, None])
        time = counts.sum(1) + np.float32(self.expert_overhead_tokens) * (counts > 0).sum(1, dtype=np.float32)
        mean = np.maximum(time, 1) / np.float32(self.num_devices)
        waking = np.float32(self.expert_overhead_tokens) / mean
        if counts.shape[1] >= SEVERAL * self.num_devices:
            return counts / mean[:, None] + waking[:, None] * (counts > 0), np.zeros_like(waking)
        return counts / mean[:, None], waking

    def _price(self, tokens_L: FloatArray) -> Float32Array:
        """What a copy within a node must save, in units of the mean device load, `[L]`."""
        exposed = self.move_tokens / (HORIZON * np.maximum(tokens_L / self.num_devices, 1.0))
        return np.maximum(LEAST_GAIN, exposed).astype(np.float32)

    def _factor(self, num_devices: int) -> Float32Array:
        """Factor to that price for a copy from one device to another, `[G, G]`."""
        node = np.arange(num_devices) // (self.devices_per_node or num_devices)
        return np.where(node[:, None] == node, 1.0, self.between_nodes).astype(np.float32)

    def _within_budget(self, moves_L: IntArray, gain_L: Float32Array) -> BoolArray:
        """Layers that are changed, `[L]`: all, or the layers that gain most for a move."""
        if self.max_moves is None or moves_L.sum() <= self.max_moves:
            return np.ones(len(moves_L), dtype=bool)
        changed, left = np.zeros(len(moves_L), dtype=bool), self.max_moves
        for layer in np.argsort(-gain_L / np.maximum(moves_L, 1), kind="stable"):
            if moves_L[layer] <= left:
                changed[layer] = True
                left -= moves_L[layer]
        return changed

    def _check(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> None:
        shape = (len(current.phy2log), current.num_experts)
        if (current.num_devices, current.num_redundant_experts) != (self.num_devices, self.num_redundant_experts):
            raise ValueError(
                f"the plan is for {current.num_devices} devices and {current.num_redundant_experts} redundant experts, "
                f"the planner for {self.num_devices} and {self.num_redundant_experts}"
            )
        if forecast.share.shape != shape:
            raise ValueError(f"forecast '{forecast.source}' is {forecast.share.shape}, the plan is for {shape}")
        if recent.ndim != 3 or recent.shape[1:] != shape:
            raise ValueError(f"recent loads have shape {recent.shape}, expected [batches, {shape[0]}, {shape[1]}]")


@cache
def _announce_compiling(kernels: ModuleType) -> None:
    """Logs that numba will compile the kernels, before the first plan of a process that finds no up-to-date cache."""
    source = Path(str(kernels.__file__))
    stored = Path(kernels.improve.stats.cache_path or "").glob(f"{source.stem}.improve-*.nbi")
    if not any(index.stat().st_mtime >= source.stat().st_mtime for index in stored):
        log.info("compiling the planner's kernels, once per machine; this takes some seconds")
