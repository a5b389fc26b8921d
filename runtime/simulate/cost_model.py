"""Cost model and verdict: whether replication saves enough expert time on recorded traffic, with an interval.

A device's time for a layer is the time to read the weights of its active experts and to compute its tokens; a layer
takes as long as its slowest device. Experts move and plans are made while the batch before runs, so only the time
beyond that batch is exposed. The split is not overlapped and is counted in full. Attention, routing and communication
are left out, so the gain is a share of expert time.

Shape suffixes: N steps, L MoE layers, G devices.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from data.arrays import FloatArray
from predictor.evaluation.bootstrap import resampled
from runtime.simulate.replay import Replay

WORTH = 0.1
"""Share of expert time (0 to 1) that must be saved to pay for the memory of the replicas."""
FEWEST = 16
"""Number of steps below which the verdict is always "not enough data"."""
TRUTHS = ("oracle", "exact")
"""Forecasts that know the load, which no deployment can have in time."""


@dataclass(frozen=True)
class Hardware:
    """Speeds that turn tokens and moves into seconds.

    Attributes:
        expert_bytes: Weights of one expert of one layer, bytes.
        tokens_per_second: Tokens a device computes with one expert's weights, per second.
        bytes_per_second: Bytes a device can receive over its link, per second.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights.
    """

    expert_bytes: float
    tokens_per_second: float
    bytes_per_second: float
    expert_overhead_tokens: float

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "tokens_per_second", "bytes_per_second"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number above 0")
        if not 0 <= self.expert_overhead_tokens < float("inf"):
            raise ValueError(f"expert_overhead_tokens is {self.expert_overhead_tokens}, expected 0 or more")

    @property
    def move_tokens(self) -> float:
        """Tokens a device computes in the time one expert moves."""
        return self.expert_bytes / self.bytes_per_second * self.tokens_per_second

    def batch_seconds(self, replay: Replay) -> FloatArray:
        """Expert time of each step, the slowest device deciding in each layer, `[N]`."""
        tokens = replay.device_load + self.expert_overhead_tokens * replay.active
        return np.asarray(tokens.max(-1).sum(-1) / self.tokens_per_second)

    def net_seconds(self, replay: Replay) -> FloatArray:
        """Expert time of each step plus the exposed time of its moves and plan and the time of its split, `[N]`."""
        batch = self.batch_seconds(replay)
        if replay.planner == "contiguous":
            return batch
        before = np.zeros_like(batch) if replay.forecast == "exact" else np.concatenate([batch[:1], batch[:-1]])
        moves = replay.arrivals.max(-1) * self.expert_bytes / self.bytes_per_second
        exposed = np.maximum(moves + 1e-3 * np.median(replay.plan_ms) - before, 0)
        return np.asarray(batch + exposed + 1e-6 * np.median(replay.split_us) * replay.device_load.shape[1])


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


def verdict(contiguous: Replay, replays: list[Replay], hardware: Hardware) -> dict[str, Any]:
    """Decides between "enable", "not worth it" and "not enough data", for the best policy that deployments can have.

    Of the policies whose gain lies within the interval of the largest one, the one with the fewest moves is the best.

    The interval is a circular block bootstrap over steps, in blocks of the square root of their number: a subject or
    task that lasts many steps makes neighbours alike.

    Returns:
        JSON document: answer, why, policy, net_gain (share of the expert time without replicas), interval (90 %),
        milliseconds a step without and with, hardware.
    """
    honest = [replay for replay in replays if replay.planner != "contiguous" and replay.forecast not in TRUTHS]
    if not honest:
        return {"answer": "not enough data", "why": "no policy with replicas and a forecast was replayed"}
    without = hardware.batch_seconds(contiguous)
    gains = [_gain(without, hardware.net_seconds(replay)) for replay in honest]
    least = max(gains)[1]  # policies within the interval of the fastest one count as equal; then the fewest moves win
    alike = [index for index, (gain, *_) in enumerate(gains) if gain >= least]
    chosen = min(alike, key=lambda index: (honest[index].moves_per_layer, -gains[index][0]))
    best, net, (gain, low, high) = honest[chosen], hardware.net_seconds(honest[chosen]), gains[chosen]
    answer, why = _answer(len(net), gain, low, high)
    return {
        "answer": answer,
        "why": why,
        "policy": {"forecast": best.forecast, "planner": best.planner, "split": best.split},
        "net_gain": round(gain, 4),
        "interval": [round(low, 4), round(high, 4)],
        "step_ms": {"without": round(1e3 * float(without.mean()), 4), "with": round(1e3 * float(net.mean()), 4)},
        "hardware": {name: float(f"{value:.4g}") for name, value in asdict(hardware).items()},
    }


def _answer(steps: int, gain: float, low: float, high: float) -> tuple[str, str]:
    """The answer and its reason."""
    found = f"{gain:.1%} of expert time saved, 90 % interval {low:.1%} to {high:.1%}"
    if steps < FEWEST:
        return "not enough data", f"{steps} steps replayed, at least {FEWEST} are needed"
    if low >= WORTH:
        return "enable", found
    if high < WORTH:
        return "not worth it", f"{found}; {WORTH:.0%} is the least that pays for the memory"
    return "not enough data", f"{found}, with {WORTH:.0%} in between; replay more steps"


def _gain(without: FloatArray, net: FloatArray) -> tuple[float, float, float]:
    """Share of time saved, and the ends of its 90 % interval."""
    total = float(without.sum())
    if total <= 0:
        return 0.0, 0.0, 0.0
    steps = resampled(len(net), block=max(1, round(len(net) ** 0.5)))
    low, high = np.quantile(1 - net[steps].sum(-1) / np.maximum(without[steps].sum(-1), 1e-12), [0.05, 0.95])
    return 1 - float(net.sum()) / total, float(low), float(high)
