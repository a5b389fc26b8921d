"""What a step costs: recorded loads to seconds, on a device that was measured here or described by its speeds.

A device's time for a layer is the time to read the weights of its active experts and to compute its tokens; a layer
takes as long as its slowest device. Experts move, and forecasts and plans are made, while the batch before runs, so
only the time beyond that batch is exposed. The split is not overlapped and is counted in full. Attention is left out,
so a gain is a share of expert time. GPUs that are not here: `runtime.simulate.gpu_cost`.

Shape suffixes: N steps, L MoE layers, G devices.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from data.arrays import FloatArray, IntArray
from data.traces.load_stream import LoadStream
from runtime.balancing.planner import BETWEEN_NODES
from runtime.simulate.outcome import Outcome


class DeviceTimes(ABC):
    """Seconds that a policy's steps take on some hardware."""

    expert_bytes: float
    """Weights of one expert of one layer, bytes."""
    top_k: int | None = None
    """Experts of a token; None where that is unknown."""
    layers: int | None = None
    """MoE layers of the model; None where that is unknown."""
    memory_bytes: float | None = None
    """Memory of a device; None where that is unknown."""
    error: float = 0.0
    """How far times are likely off, as a share."""

    @property
    @abstractmethod
    def move_tokens(self) -> float:
        """Tokens a device computes in the time one expert moves within a node."""

    @property
    def between_nodes(self) -> float:
        """Time of a move between nodes, relative to one within a node, 1 or more."""
        return BETWEEN_NODES

    @abstractmethod
    def layer_seconds(self, device_load: IntArray, active: IntArray) -> FloatArray:
        """Expert time of each step and layer, the slowest device deciding, `[N, L]`.

        Args:
            device_load: Tokens each device computes, `[N, L, G]`.
            active: Slots with tokens on each device, `[N, L, G]`.
        """

    @abstractmethod
    def move_seconds(self, arrivals: IntArray, far_arrivals: IntArray) -> FloatArray:
        """Time in which devices receive experts, the slowest device deciding, `[N]`.

        Args:
            arrivals: Experts that each device receives, `[N, G]`.
            far_arrivals: Those of them that come from another node.
        """

    @abstractmethod
    def described(self, devices: int) -> dict[str, Any]:
        """The hardware assumed, for the JSON document."""

    @abstractmethod
    def check(self, stream: LoadStream, devices: int, slots: int) -> None:
        """Refuses loads that the times do not hold for, on so many devices with so many slots each.

        Raises:
            ValueError: If so.
        """

    def split_seconds(self, outcome: Outcome, quantile: float) -> float:
        """Time of the splits of a step, which nothing overlaps."""
        return float(1e-6 * np.quantile(outcome.split_us, quantile) * outcome.shape[0])

    def net_seconds(self, outcome: Outcome, host: float | None = 0.5) -> FloatArray:
        """Expert time of each step plus the exposed time of its moves, forecast and plan and its split, `[N]`.

        Args:
            outcome: What a policy did.
            host: Quantile of the times that forecasts, plans and splits took on this machine; None counts none.
        """
        batch = outcome.seconds
        if outcome.planner == "contiguous":
            return batch
        before = np.zeros_like(batch) if outcome.forecast == "exact" else np.concatenate([batch[:1], batch[:-1]])
        prepared, split = outcome.move_seconds, 0.0
        if host is not None:
            prepared = prepared + host_ms(outcome, host) / 1e3
            split = self.split_seconds(outcome, host)
        return np.asarray(batch + np.maximum(prepared - before, 0) + split)


def host_ms(outcome: Outcome, quantile: float = 0.5) -> float:
    """Milliseconds that forecast and plan of a step take on this machine."""
    forecast = 0.0 if outcome.forecast_ms is None else np.quantile(outcome.forecast_ms, quantile)
    return float(forecast + np.quantile(outcome.plan_ms, quantile))


@dataclass(frozen=True)
class Hardware(DeviceTimes):
    """Speeds that turn tokens and moves into seconds.

    Attributes:
        expert_bytes: Weights of one expert of one layer, bytes.
        tokens_per_second: Tokens a device computes with one expert's weights, per second.
        bytes_per_second: Bytes a device can receive over its link, per second.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights.
        node_bytes_per_second: Bytes a device can receive from another node, per second; None where there is one node or
            it is not known. The time of moves then does not tell nodes apart, and their price is the planner's default.
    """

    expert_bytes: float
    tokens_per_second: float
    bytes_per_second: float
    expert_overhead_tokens: float
    node_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "tokens_per_second", "bytes_per_second"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number above 0")
        if self.node_bytes_per_second is not None and not 0 < self.node_bytes_per_second < float("inf"):
            raise ValueError(f"node_bytes_per_second is {self.node_bytes_per_second}, expected a finite number above 0")
        if not 0 <= self.expert_overhead_tokens < float("inf"):
            raise ValueError(f"expert_overhead_tokens is {self.expert_overhead_tokens}, expected 0 or more")

    def check(self, stream: LoadStream, devices: int, slots: int) -> None:
        """Speeds hold for all loads."""

    @property
    def move_tokens(self) -> float:
        return self.expert_bytes / self.bytes_per_second * self.tokens_per_second

    @property
    def between_nodes(self) -> float:
        if self.node_bytes_per_second is None:
            return BETWEEN_NODES
        return max(1.0, self.bytes_per_second / self.node_bytes_per_second)

    def layer_seconds(self, device_load: IntArray, active: IntArray) -> FloatArray:
        tokens = device_load + self.expert_overhead_tokens * active
        return np.asarray(tokens.max(-1) / self.tokens_per_second)

    def move_seconds(self, arrivals: IntArray, far_arrivals: IntArray) -> FloatArray:
        near = arrivals
        if self.node_bytes_per_second is not None:
            near = arrivals + (self.between_nodes - 1) * far_arrivals
        return np.asarray(near.max(-1) * self.expert_bytes / self.bytes_per_second)

    def described(self, devices: int) -> dict[str, Any]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items() if value is not None}


def measure(expert_bytes: float) -> Hardware:
    """Measures this machine as one device, with its memory as the link; takes a tenth of a second.

    An expert is modelled as one square bf16 weight matrix, two operations a weight and token.
    """
    side = max(int((expert_bytes / 2) ** 0.5), 1)
    weights = [torch.randn(side, side) for _ in range(4)]
    one, many = torch.randn(1, side), torch.randn(256, side)

    def seconds(rows: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            for weight in weights:
                rows @ weight
            best = min(best, (time.perf_counter() - began) / len(weights))
        return best

    target = torch.empty_like(weights[0])
    began = time.perf_counter()
    for weight in weights:
        target.copy_(weight)
    copied = (time.perf_counter() - began) / len(weights)
    token = max(seconds(many) - seconds(one), 1e-9) / (len(many) - 1)
    return Hardware(expert_bytes, 1 / token, 4 * side**2 / copied, max(seconds(one) / token - 1, 0.0))
