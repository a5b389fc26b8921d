"""The verdict: whether replication saves enough expert time on recorded traffic, against what, with which policy.

The policy judged is the best that a deployment can have. Past batches are preferred: a trained predictor is named only
where it is faster than the best policy without one by more than chance.
"""

from typing import Any

import numpy as np

from data.arrays import FloatArray
from predictor.evaluation.bootstrap import resampled
from runtime.simulate.cost_model import DeviceTimes, host_ms
from runtime.simulate.forecasters import TRAINED, TRUTHS
from runtime.simulate.outcome import Outcome

WORTH = 0.1
"""Share of expert time (0 to 1) that must be saved to pay for the memory of the replicas."""
MOST_MEMORY = 0.5
"""Most replicas, as a share of the experts, that "enable" is said for: beyond, their memory has better uses."""
FEWEST = 16
"""Number of steps below which the verdict is always "not enough data"."""
HOST = (0.05, 0.5, 0.95)
"""Quantiles of this machine's times: where it is fast, as usual, and slow."""
MOST_BINS = 2048
"""Most sums of neighbouring steps that are drawn from; longer recordings are summed up before."""


def verdict(contiguous: Outcome, outcomes: list[Outcome], times: DeviceTimes) -> dict[str, Any]:
    """Decides between "enable", "not worth it" and "not enough data", for the best policy that deployments can have.

    Of the policies whose gain lies within the interval of the largest one, the one with the fewest moves is the best.
    The interval is a circular block bootstrap over steps, in blocks of the square root of their number: a subject or
    task that lasts many steps makes neighbours alike. It is widened by the spread of this machine's times for forecast,
    plan and split, and by the error of the hardware's times.

    Returns:
        JSON document: answer, why, policy, net_gain (share of the expert time without replicas), interval (90 %),
        milliseconds a step and a layer without replicas and with the policy, those of this machine (host_ms), baselines
        (no replicas, and the best policy without a predictor), memory of the replicas, hardware.
    """
    honest = [item for item in outcomes if item.planner != "contiguous" and item.forecast not in TRUTHS]
    if not honest:
        return {"answer": "not enough data", "why": "no policy with replicas and a forecast was replayed"}
    without = contiguous.seconds
    net = {id(item): times.net_seconds(item) for item in honest}
    free = [item for item in honest if item.forecast not in TRAINED]
    best, beaten = _best(honest, net, without), ""
    rival = _best(free, net, without) if free else None
    if rival and best.forecast in TRAINED:
        fastest = min(free, key=lambda item: float(net[id(item)].sum()))
        if gain(net[id(fastest)], net[id(best)])[1] <= 0:
            beaten = f"; the forecast {best.forecast} is not faster than {fastest.forecast}, which needs no predictor"
            best = rival
    low, usual, high = (times.net_seconds(best, quantile) for quantile in HOST)
    memory = memory_of(best, times)
    found = judged(without, (low, usual, high), memory, times)
    return found | {
        "why": found["why"] + beaten,
        "policy": _policy(best),
        "host_ms": _host(best, without, usual, times),
        "baselines": {
            "no replicas": {"step_ms": _ms(without)},
            "no predictor": _policy(rival) | {"step_ms": _ms(net[id(rival)])} if rival else None,
        },
        "memory": memory,
        "hardware": times.described(contiguous.shape[-1]),
    }


def judged(
    without: FloatArray, net: tuple[FloatArray, FloatArray, FloatArray], memory: dict[str, Any], times: DeviceTimes
) -> dict[str, Any]:
    """The answer for a policy, its reason, what it saves and its times.

    Args:
        without: Seconds of each step without replicas, `[N]`.
        net: With the policy: where this machine is fast, as usual, and slow, `[N]` each.
        memory: What the replicas take, see `memory_of`.
        times: What steps cost.

    Returns:
        Part of the JSON document of `verdict`: answer, why, net_gain, interval, step_ms, layer_ms.
    """
    fast, usual, slow = net
    saved, low, high = gain(without, usual)[0], gain(without, slow)[1], gain(without, fast)[2]
    off = times.error * (1 - saved)  # a ratio of two times that are both off by about that much, at worst
    answer, why = _answer(len(without), (saved, low, high), off, memory, times.memory_bytes)
    layers = memory["recorded_layers"]
    return {
        "answer": answer,
        "why": why,
        "net_gain": round(saved, 4),
        "interval": [round(low - off, 4), round(high + off, 4)],
        "step_ms": {"without": _ms(without), "with": _ms(usual)},
        "layer_ms": {"without": _ms(without, layers), "with": _ms(usual, layers)},
    }


def _host(best: Outcome, without: FloatArray, usual: FloatArray, times: DeviceTimes) -> dict[str, float]:
    """Milliseconds a step that this machine takes: to prepare a plan, to split, and what of it delays the step."""
    bare = times.net_seconds(best, None)
    return {
        "prepare": round(host_ms(best), 4),
        "split": round(1e3 * times.split_seconds(best, 0.5), 4),
        "exposed": round(_ms(usual) - _ms(bare), 4),
        "net_gain_without": round(gain(without, bare)[0], 4),
    }


def _policy(item: Outcome) -> dict[str, str]:
    return {"forecast": item.forecast, "planner": item.planner, "split": item.split}


def _ms(seconds: FloatArray, layers: int = 1) -> float:
    return round(1e3 * float(seconds.mean()) / layers, 4)


def _best(outcomes: list[Outcome], net: dict[int, FloatArray], without: FloatArray) -> Outcome:
    """Of the policies whose gain lies within the interval of the largest one, the one with the fewest moves."""
    gains = {id(item): gain(without, net[id(item)]) for item in outcomes}
    least = max(gains.values())[1]
    alike = [item for item in outcomes if gains[id(item)][0] >= least]
    return min(alike, key=lambda item: (item.moves_per_layer, -gains[id(item)][0]))


def memory_of(best: Outcome, times: DeviceTimes) -> dict[str, Any]:
    """What the replica slots of a policy take on a device, in all layers of the model, and as shares."""
    recorded, experts, slots, devices = best.shape
    layers, redundant = max(times.layers or 0, recorded), slots - experts
    each = layers / devices * times.expert_bytes
    return {
        "bytes_per_device": round(redundant * each),
        "share_of_experts": round(redundant / experts, 4),
        "share_of_device": round(redundant * each / times.memory_bytes, 4) if times.memory_bytes else None,
        "with_experts": round((experts + redundant) * each),
        "layers": layers,
        "recorded_layers": recorded,
    }


def _answer(
    steps: int, found: tuple[float, float, float], off: float, memory: dict[str, Any], available: float | None
) -> tuple[str, str]:
    """The answer and its reason, from a gain and its interval, what the error of the times adds, and the memory."""
    saved, low, high = found
    why = f"{abs(saved):.1%} of expert time {'saved' if saved >= 0 else 'lost'}"
    why += f", 90 % interval of what is saved {low - off:.1%} to {high + off:.1%}"
    if steps < FEWEST:
        return "not enough data", f"{steps} steps replayed, at least {FEWEST} are needed"
    if low - off >= WORTH:
        if unfit := _unfit(memory, available):
            return "not worth it", f"{why}; but {unfit}"
        return "enable", why
    if high + off < WORTH:
        return "not worth it", f"{why}; {WORTH:.0%} is the least that pays for the memory"
    mend = "replay more steps" if low < WORTH <= high else f"the times are uncertain by {off:.1%}: measure on your GPUs"
    return "not enough data", f"{why}, with {WORTH:.0%} in between; {mend}"


def _unfit(memory: dict[str, Any], available: float | None) -> str:
    """Why the memory of the replicas is too much, if it is."""
    if available and memory["with_experts"] > available:
        taken, there = memory["with_experts"] / 1e9, available / 1e9
        return f"experts and replicas take {taken:.0f} GB of a device, which has {there:.0f}: simulate more devices"
    if (share := memory["share_of_experts"]) > MOST_MEMORY:
        return (
            f"the replicas are {share:.0%} of the experts, and above {MOST_MEMORY:.0%} their memory has better uses: "
            "simulate fewer"
        )
    return ""


def gain(without: FloatArray, net: FloatArray) -> tuple[float, float, float]:
    """Share of time saved, and the ends of its 90 % interval."""
    total = float(without.sum())
    if total <= 0:
        return 0.0, 0.0, 0.0
    width = -(-len(net) // MOST_BINS)
    edges = range(0, len(net), width)
    sums, net_sums = np.add.reduceat(without, edges), np.add.reduceat(net, edges)
    bins = resampled(len(net_sums), block=max(1, round(len(net) ** 0.5 / width)))
    low, high = np.quantile(1 - net_sums[bins].sum(-1) / np.maximum(sums[bins].sum(-1), 1e-12), [0.05, 0.95])
    return 1 - float(net.sum()) / total, float(low), float(high)
