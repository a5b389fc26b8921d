"""Time of a plan and of a token split, ours and EPLB's, against the targets, on one thread.

    python -m benchmarks.planner

Loads follow Zipf shares that drift a little at every step, or are drawn in a new order at every step, so that history
is useless. Each step is planned from the last batch and split. Prints a table and, as the last line, one JSON document.
Times are medians over the steps after the first five. `first_call_s` is the time of the first plan and split, which
compile the kernels or read them from numba's cache (NUMBA_CACHE_DIR=$(mktemp -d) starts with an empty cache).
"""

import json
import sys
import time
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.arrays import IntArray
from predictor.baselines.history import LastBatch
from runtime.balancing.eplb import EplbPlanner
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner, Planner
from runtime.balancing.split import split_by_quota

SHAPES = (
    # layers, experts, redundant, devices, tokens, target of a plan in ms, target of a split in us
    (12, 128, 16, 8, 4096, 5.0, 200.0),
    (58, 256, 32, 32, 32768, 40.0, None),
)
STEPS, WARM = 30, 5
DRIFT = 0.05
"""Standard deviation of the step of each log share."""


def made_up(layers: int, experts: int, tokens: int, related: bool) -> Iterator[IntArray]:
    """Yields the load `[L, E]` of each step."""
    rng = np.random.default_rng(0)
    logs = -np.log(rng.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1))
    for _ in range(STEPS):
        logs = logs + DRIFT * rng.standard_normal(logs.shape) if related else rng.permuted(logs, axis=1)
        share = np.exp(logs)
        yield rng.multinomial(tokens, share / share.sum(-1, keepdims=True))


def milliseconds(planner: Planner, loads: IntArray, first: ReplicationPlan) -> tuple[float, float, float, float]:
    """Medians: milliseconds of a plan, microseconds of a split with one source and with a source on each device, and
    moves a layer.
    """
    plan, times, moves = first, [], []
    one: list[float] = []
    each: list[float] = []
    rng = np.random.default_rng(1)
    for step in range(1, len(loads)):
        forecast = LastBatch().forecast(None, loads[:step])
        began = time.perf_counter()
        target = planner.plan(forecast, plan, loads[:step])
        times.append(1e3 * (time.perf_counter() - began))
        moves.append(len(plan.moves_to(target)) / len(target.phy2log))
        plan = target
        load, phy2log = loads[step, 0], plan.phy2log[0]
        sources = np.ascontiguousarray(rng.multinomial(load, np.full(plan.num_devices, 1 / plan.num_devices)).T)
        for counts, kept in ((load[None], one), (sources, each)):
            began = time.perf_counter()
            split_by_quota(counts, phy2log, plan.num_devices)
            kept.append(1e6 * (time.perf_counter() - began))
    return tuple(float(np.median(kept[WARM:])) for kept in (times, one, each, moves))  # type: ignore[return-value]


def first_call() -> dict[str, float]:
    """Seconds the first plan and the first split of this process take."""
    load = np.arange(1, 17)[None]
    plan = ReplicationPlan.at_home(flat_homes(load.astype(np.float64), 4), 4, 4)
    forecast = LastBatch().forecast(None, np.stack([load, load[:, ::-1]]))
    began = time.perf_counter()
    HomePlanner(4, 4).plan(forecast, plan, np.stack([load, load[:, ::-1]]))
    planned = time.perf_counter()
    split_by_quota(load[0], plan.phy2log[0], 4)
    return {"plan": round(planned - began, 2), "split": round(time.perf_counter() - planned, 2)}


def main() -> None:
    """Measures all shapes."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    first_call_s = first_call()
    table = Table(title=f"One thread; first plan after {first_call_s['plan']} s, first split {first_call_s['split']} s")
    for name in ("layers x experts", "redundant", "devices", "loads", "planner", "plan ms", "target", "moves/layer"):
        table.add_column(name, justify="right")
    table.add_column("split µs, 1 source", justify="right")
    table.add_column("a source each", justify="right")
    results = []
    cases = [(*shape, related) for shape in SHAPES for related in (True, False)]
    for layers, experts, redundant, devices, tokens, plan_target, split_target, related in track(
        cases, "shapes", console=Console(stderr=True)
    ):
        loads = np.stack(list(made_up(layers, experts, tokens, related)))
        first = ReplicationPlan.at_home(flat_homes(loads[0].astype(np.float64), devices), devices, redundant)
        kind = "drifting" if related else "unrelated"
        for name, planner in (("home", HomePlanner(devices, redundant)), ("eplb", EplbPlanner())):
            plan_ms, one, each, moves = milliseconds(planner, loads, first)
            results.append({
                "layers": layers, "experts": experts, "redundant": redundant, "devices": devices, "loads": kind,
                "planner": name, "plan_ms": round(plan_ms, 3), "plan_target_ms": plan_target,
                "moves_per_layer": round(moves, 2), "split_us": round(one, 1), "split_sources_us": round(each, 1),
                "split_target_us": split_target,
            })  # fmt: skip
            table.add_row(
                f"{layers} x {experts}", str(redundant), str(devices), kind, name, f"{plan_ms:.2f}",
                f"{plan_target:.0f}", f"{moves:.2f}", f"{one:.0f}", f"{each:.0f}",
            )  # fmt: skip
    console.print(table)
    print(json.dumps({"first_call_s": first_call_s, "results": results}))


if __name__ == "__main__":
    main()
