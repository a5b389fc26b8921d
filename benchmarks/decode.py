"""Placement in decoding: few tokens a device, where a device's time is waking its experts plus computing their tokens.

    python -m benchmarks.decode                                     # all sizes, 2 layers of each
    python -m benchmarks.decode --devices 8 --tokens 4 --price 128
    python -m benchmarks.decode --devices 8 --loads counts.npz      # recorded counts `[steps, layers, experts]`
    python -m benchmarks.decode --trace outputs/traces/gpt-oss --tokens 4   # recorded requests, a token each

A device's time is `price * active slots + tokens`, in units of one token; a step takes as long as its slowest device.
The figure is a lower bound of that time over the time: the larger of the mean device time with every needed expert
active once, and the time of the device that must have the most active slots. Batches are drawn anew at every step from
Zipf shares that drift; each token chooses K different experts. With --trace they are steps in which recorded requests
write a token each, as many as make up the tokens of the size; layers stand side by side as one layer of more experts.
Plans are made from a moving average of past batches, or from the coming batch itself (oracle). Arms:

- *none*: no replicas.
- *tokens*: our plan, which balances tokens; *time*: our plan, which counts active experts. Both with the same split,
  which counts them.
- *eplb even*, *eplb split*: EPLB's plan with its own even split, and with our split.

Prints a table and, in a pipe, one line of JSON. Times are processor time of one thread, scaled to 58 layers.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.arrays import FloatArray, IntArray
from data.cli import print_json, user_errors
from data.models.layout import MoELayout
from data.traces.requests import ordered, requests_of, serve
from data.traces.store import open_trace
from predictor.baselines.history import Ema, Oracle
from predictor.forecast import Forecaster
from runtime.balancing.eplb import EplbPlanner
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner, Planner
from runtime.balancing.split import split_by_quota, split_evenly

SHAPES = (
    # devices, experts, redundant, experts a token, tokens a device
    (8, 32, 8, 4, 1), (8, 32, 8, 4, 16), (8, 64, 8, 8, 1), (8, 64, 8, 8, 4), (8, 64, 8, 8, 16),
    (32, 256, 32, 8, 2), (128, 256, 128, 8, 4), (128, 256, 128, 8, 16), (256, 256, 256, 8, 4),
    (320, 256, 64, 8, 4), (320, 256, 64, 8, 16),
)  # fmt: skip
STEPS, WARM = 40, 10
BEGIN = 64
"""First step of recorded requests, most of which are in their answers by then."""
ZIPF, DRIFT = 0.7, 0.02
"""Exponent of the shares; standard deviation of the step of each log share."""
MODEL_LAYERS = 58
"""MoE layers of DeepSeek-V3, to which the time of a plan is scaled."""
Split = Callable[[IntArray, IntArray, int], IntArray]


def drawn(layers: int, experts: int, tokens: int, top_k: int) -> IntArray:
    """Counts `[N, L, E]` of batches in which each token chooses K different experts (Gumbel top-K of log shares)."""
    rng = np.random.default_rng(0)
    logs = -ZIPF * np.log(rng.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1))
    counts = np.empty((STEPS, layers, experts), dtype=np.int64)
    for step in range(STEPS):
        logs = logs + DRIFT * rng.standard_normal(logs.shape)
        for layer in range(layers):
            keys = logs[layer] + rng.gumbel(size=(tokens, experts))
            chosen = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
            counts[step, layer] = np.bincount(chosen.ravel(), minlength=experts)
    return counts


def side_by_side(layout: MoELayout, experts: int) -> int:
    """Layers of a recording that make up one layer of so many experts; 0 if none do."""
    parts = experts // layout.num_experts
    return 0 if experts % layout.num_experts or parts > layout.num_layers else parts


def recorded(trace: Path, experts: int, assignments: int) -> IntArray:
    """Counts `[N, L, E]` of steps in which recorded requests decode, the recorded layers side by side.

    Args:
        trace: Folder of a token trace with requests.
        experts: E, which some recorded layers make up.
        assignments: About as many of each step and folded layer; requests are chosen accordingly.

    Raises:
        ValueError: If the requests do not suffice.
    """
    recording = open_trace(trace)
    layout, each = recording.layout, recording.layout.num_experts
    parts = side_by_side(layout, experts)
    slots = max(1, round(assignments / (parts * layout.experts_per_token)))
    requests = ordered(requests_of(recording), "shuffled")
    steps = list(islice(serve(requests, slots, 1), BEGIN, BEGIN + STEPS))
    if len(steps) < STEPS or len(steps[-1]) < slots:
        needed = f"{slots} requests at a time for {BEGIN + STEPS} steps"
        raise ValueError(f"{trace} has too few requests to decode {needed}; choose fewer devices or tokens")
    counts = np.zeros((STEPS, layout.num_layers, each), dtype=np.int64)
    for number, step in enumerate(steps):
        routes = np.concatenate([chunk.request.experts[chunk.start : chunk.stop] for chunk in step])
        for layer in range(layout.num_layers):
            counts[number, layer] = np.bincount(routes[:, layer].ravel(), minlength=each)
    layers = layout.num_layers // parts
    return counts[:, : layers * parts].reshape(STEPS, layers, experts)


def least_time(counts_E: IntArray, devices: int, price: int) -> int:
    """A lower bound of the slowest device's time: no placement and no split is faster.

    In a time T a slot computes at most T - price tokens, so an expert with n tokens is active in n / (T - price) slots,
    rounded up; a device has at most T / (price + 1) active slots; and all devices together have the time G T.
    """
    low, high = price + 1, price * len(counts_E) + int(counts_E.sum())
    while low < high:
        middle = (low + high) // 2
        slots = int((-(-counts_E // (middle - price))).sum())
        enough = counts_E.sum() + price * slots <= devices * middle and slots <= devices * (middle // (price + 1))
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def slowest(counts_E: IntArray, phy2log: IntArray, devices: int, price: int, split: Split) -> int:
    """Time of the slowest device."""
    quota = split(counts_E, phy2log, devices).sum(0).reshape(devices, -1)
    return int((quota + price * (quota > 0)).sum(-1).max())


def run(
    loads: IntArray, home: ReplicationPlan, planner: Planner | None, forecaster: Forecaster, price: int, split: Split
) -> dict[str, float]:
    """Share of the lower bound, moves a layer and milliseconds of a plan, after the first steps."""
    plan, layers = home, loads.shape[1]
    shares, moves, plan_ms = [], [], []
    for step in range(1, len(loads)):
        forecast = forecaster.forecast(None, loads[:step])
        began = time.process_time()
        target = plan if planner is None else planner.plan(forecast, plan, loads[:step])
        plan_ms.append(1e3 * (time.process_time() - began) * MODEL_LAYERS / layers)
        moves.append(len(plan.moves_to(target)) / layers)
        plan = target
        times = [
            slowest(counts, phy2log, home.num_devices, price, split)
            for counts, phy2log in zip(loads[step], plan.phy2log, strict=True)
        ]
        least = [least_time(counts, home.num_devices, price) for counts in loads[step]]
        shares.append(np.mean(np.divide(least, times)))
    return {
        "share": round(float(np.mean(shares[WARM:])), 4), "moves": round(float(np.mean(moves[WARM:])), 2),
        "plan_ms": round(float(np.median(plan_ms[WARM:])), 1),
    }  # fmt: skip


def measure(loads: IntArray, devices: int, redundant: int, price: int) -> dict[str, dict[str, float]]:
    """All arms over the same batches. Homes are balanced over the uncounted steps."""
    known: FloatArray = loads[:WARM].mean(0)
    home = ReplicationPlan.at_home(flat_homes(known, devices, redundant), devices, redundant)
    tokens, timed = HomePlanner(devices, redundant), HomePlanner(devices, redundant, expert_overhead_tokens=price)
    past, oracle = Ema(), Oracle(loads)

    def priced(counts: IntArray, phy2log: IntArray, devices: int) -> IntArray:
        return split_by_quota(counts, phy2log, devices, expert_overhead_tokens=price)

    arms: dict[str, tuple[Planner | None, Forecaster, Split]] = {
        "none": (None, past, priced),
        "eplb even": (EplbPlanner(), past, split_evenly),
        "eplb split": (EplbPlanner(), past, priced),
        "tokens": (tokens, past, priced),
        "time": (timed, past, priced),
        "tokens, oracle": (tokens, oracle, priced),
        "time, oracle": (timed, oracle, priced),
    }
    return {name: run(loads, home, planner, told, price, split) for name, (planner, told, split) in arms.items()}


def main() -> None:
    """Measures the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="*", help="sizes to measure; all of them by default")
    parser.add_argument("--tokens", type=int, help="tokens a device, in place of those of the sizes")
    parser.add_argument("--price", type=int, nargs="+", default=[32, 128], help="tokens that waking an expert costs")
    parser.add_argument("--layers", type=int, default=2, help="layers of made-up loads")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--loads", type=Path, help="recorded counts (.npz with `counts`)")
    source.add_argument("--trace", type=Path, help="folder of a trace with requests, which decode")
    options = parser.parse_args()
    if options.tokens is not None and options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}, expected 1 or more")
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[dict[str, Any]] = []
    shapes = [shape for shape in SHAPES if not options.devices or shape[0] in options.devices]
    if options.tokens is not None:
        shapes = list(dict.fromkeys((*shape[:4], options.tokens) for shape in shapes))
    if options.trace is not None:
        layout = open_trace(options.trace).layout
        shapes = [shape for shape in shapes if side_by_side(layout, shape[1])]
    if not shapes:
        sizes = ", ".join(map(str, dict.fromkeys(shape[0] for shape in SHAPES)))
        raise ValueError(f"no size has such devices and experts; there are sizes of {sizes} devices")
    for devices, experts, redundant, top_k, each in track(shapes, "sizes", console=Console(stderr=True)):
        if options.loads:
            loads = np.load(options.loads)["counts"].astype(np.int64)
        elif options.trace is not None:
            loads = recorded(options.trace, experts, each * devices * top_k)
        else:
            loads = drawn(options.layers, experts, each * devices, top_k)
        for price in options.price:
            shape = {"devices": devices, "experts": loads.shape[2], "redundant": redundant, "tokens": each}
            rows.append(shape | {"price": price, "arms": measure(loads, devices, redundant, price)})
    table = Table(title="Share of the lower bound of the slowest device's time; moves a layer; plan in ms")
    for name in ("devices", "experts", "redundant", "tokens", "price", *rows[0]["arms"], "moves", "plan ms"):
        table.add_column(name, justify="right")
    for row in rows:
        arms = row["arms"]
        table.add_row(
            *(str(value) for name, value in row.items() if name != "arms"),
            *(f"{arm['share']:.3f}" for arm in arms.values()),
            *(" ".join(str(arms[name][figure]) for name in ("tokens", "time")) for figure in ("moves", "plan_ms")),
        )
    console.print(table)
    print_json({"results": rows})


if __name__ == "__main__":
    with user_errors():
        main()
