"""From a forecast to the plan for the coming batch: homes stay, replicas change where that pays.

Shape suffixes: K recent loads, L MoE layers, E logical experts, R redundant experts, P slots, G devices.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.arrays import Float32Array, FloatArray, IntArray
from predictor.forecast import LoadForecast, LoadHistory
from runtime.balancing.local_search import improve
from runtime.balancing.plan import ReplicationPlan, check_division
from runtime.balancing.scenarios import scenarios


class Planner(Protocol):
    """Turns a forecast into a plan, given the active plan and the loads of the last batches."""

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """The plan for the coming batch."""
        ...


@dataclass(frozen=True)
class HomePlanner:
    """Chooses replicas so that the load after an optimal split is flattest, over the scenarios of a forecast.

    It holds no state: the same forecast, plan and loads give the same plan. Unlike processors may round unlike, so one
    rank plans and tells the others.

    Attributes:
        num_devices: G.
        num_redundant: R, replica slots a layer over all devices, R / G on each.
        max_moves: Most experts moved before a batch, over all layers (a budget in bytes over the bytes of an expert);
            None moves as many as pay. The layers that gain most for a move come first.
        least_gain: What a move must save, as a share of the mean device load.
        move_tokens: Tokens a device computes in the time a move holds it up; 0 where moves are hidden.
        horizon: Batches a replica is expected to serve; a move that holds a device up must pay within them.
        devices_per_node: Devices that share a fast network; None means one node.
        between_nodes: Price of a move between nodes, relative to one within.
    """

    num_devices: int
    num_redundant: int
    max_moves: int | None = None
    least_gain: float = 0.001
    move_tokens: float = 0.0
    horizon: float = 16.0
    devices_per_node: int | None = None
    between_nodes: float = 4.0

    def __post_init__(self) -> None:
        check_division(self.num_devices, self.num_devices, self.num_redundant)
        if self.max_moves is not None and self.max_moves < 0:
            raise ValueError(f"max_moves is {self.max_moves}, expected 0 or more, or None for no limit")
        if not 1 <= self.between_nodes < float("inf"):
            raise ValueError(f"between_nodes is {self.between_nodes}, expected 1 or more")
        for name in ("least_gain", "move_tokens"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a figure from 0")
        if not self.horizon > 0:
            raise ValueError(f"horizon is {self.horizon}, expected more than 0 batches")
        if (node := self.devices_per_node) is not None and (node < 1 or self.num_devices % node):
            raise ValueError(f"{node} devices a node do not divide {self.num_devices} devices")

    def plan(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> ReplicationPlan:
        """The plan for the coming batch.

        Args:
            forecast: Of the coming batch's load, `[L, E]`; its spread says how far it may be off.
            current: The plan in force; its homes are kept.
            recent: Loads of the last batches, oldest first, `[K, L, E]`; K may be 0.

        Raises:
            ValueError: If forecast, plan and loads are not of the same model and devices.
        """
        self._check(forecast, current, recent)
        if self.num_redundant == 0 or self.max_moves == 0:
            return current
        blocks = current.phy2log.reshape(len(current.phy2log), self.num_devices, -1)
        held = blocks[:, :, current.num_experts // self.num_devices :].reshape(len(blocks), -1)
        home = current.homes // current.slots_per_device
        shares, weights = scenarios(forecast, recent)
        load = shares * np.float32(self.num_devices)
        limit = self.num_redundant if self.max_moves is None else min(self.num_redundant, self.max_moves)
        wanted, gain = improve(held, home, load, weights, self._price(forecast.tokens), self._factor(), limit)
        phy2log = current.phy2log.copy()
        phy2log[:, ~current.is_home_slot] = self._within_budget(held, wanted, gain)
        return ReplicationPlan(phy2log, self.num_devices)

    def _price(self, tokens_L: FloatArray) -> Float32Array:
        """What a copy within a node must save, in units of the mean device load, `[L]`."""
        exposed = self.move_tokens / (self.horizon * np.maximum(tokens_L / self.num_devices, 1.0))
        return np.maximum(self.least_gain, exposed).astype(np.float32)

    def _factor(self) -> Float32Array:
        """Factor to that price for a copy from one device to another, `[G, G]`."""
        node = np.arange(self.num_devices) // (self.devices_per_node or self.num_devices)
        return np.where(node[:, None] == node, 1.0, self.between_nodes).astype(np.float32)

    def _within_budget(self, held: IntArray, wanted: IntArray, gain: Float32Array) -> IntArray:
        """The wanted replicas `[L, R]` of the layers that gain most for a move, the others as they are."""
        moves = (held != wanted).sum(-1)
        if self.max_moves is None or moves.sum() <= self.max_moves:
            return wanted
        kept, left = held.copy(), self.max_moves
        for layer in np.argsort(-gain / np.maximum(moves, 1), kind="stable"):
            if moves[layer] <= left:
                kept[layer] = wanted[layer]
                left -= moves[layer]
        return kept

    def _check(self, forecast: LoadForecast, current: ReplicationPlan, recent: LoadHistory) -> None:
        shape = (len(current.phy2log), current.num_experts)
        if current.num_devices != self.num_devices or current.num_redundant != self.num_redundant:
            raise ValueError(
                f"the plan is for {current.num_devices} devices and {current.num_redundant} redundant experts, "
                f"the planner for {self.num_devices} and {self.num_redundant}"
            )
        if forecast.share.shape != shape:
            raise ValueError(f"forecast '{forecast.source}' is {forecast.share.shape}, the plan is for {shape}")
        if recent.ndim != 3 or recent.shape[1:] != shape:
            raise ValueError(f"recent loads have shape {recent.shape}, expected [batches, {shape[0]}, {shape[1]}]")
