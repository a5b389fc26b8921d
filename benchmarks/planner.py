"""Placement at production size: balancedness, moves and time of plans and splits, ours beside EPLB's, on one thread.

    python -m benchmarks.planner                                    # all sizes, 4 layers of each
    python -m benchmarks.planner --devices 64 256 --layers 58       # whole models, for times
    python -m benchmarks.planner --devices 8 --redundant 16 --loads tests/runtime/recorded/gptoss20b.npz

Loads follow Zipf shares of exponent .7 that drift at every step, or are drawn in a new order every ten steps, with
1,024 tokens a device; or they are recorded counts `[steps, layers, experts]`. Each step is planned from its true load
(oracle) or from the last batch. *From empty* is the balancedness under the first plan, *steady* the mean after the
first five steps. EPLB splits evenly, by its global policy and, where nodes of 8 devices divide, by its hierarchical one
with 8 groups. Times are processor time: medians after the first five steps, those of a plan scaled to 58 layers. Prints
a table and, as the last line, one JSON document. `first_call_s` is the time of the first plan and split, which compile
the kernels or read them from numba's cache (NUMBA_CACHE_DIR=$(mktemp -d) starts with an empty cache).
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.arrays import FloatArray, IntArray
from predictor.baselines.history import LastBatch, Oracle
from predictor.forecast import Forecaster
from runtime.balancing.eplb import rebalance_experts
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.balancing.split import device_load, split_by_quota

SHAPES = (
    # devices, experts, redundant
    (8, 256, 8), (32, 256, 32), (64, 256, 64), (72, 256, 32), (96, 384, 96),
    (128, 256, 128), (144, 256, 32), (256, 256, 256), (320, 256, 64),
)  # fmt: skip
STEPS, WARM = 30, 5
TOKENS = 1024
"""Tokens a device and step."""
ZIPF, DRIFT, TURN = 0.7, 0.05, 10
"""Exponent of the shares; standard deviation of the step of each log share; steps between changes of the order."""
MODEL_LAYERS = 58
"""MoE layers of DeepSeek-V3, to which the time of a plan is scaled."""


def made_up(layers: int, experts: int, tokens: int, drifting: bool) -> IntArray:
    """Loads `[N, L, E]`."""
    rng = np.random.default_rng(0)
    logs = -ZIPF * np.log(rng.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1))
    loads = []
    for step in range(STEPS):
        if drifting:
            logs = logs + DRIFT * rng.standard_normal(logs.shape)
        elif step % TURN == 0:
            logs = rng.permuted(logs, axis=1)
        share = np.exp(logs)
        loads.append(rng.multinomial(tokens, share / share.sum(-1, keepdims=True)))
    return np.stack(loads)


def ours(loads: IntArray, devices: int, redundant: int, forecaster: Forecaster) -> dict[str, float]:
    """Balancedness from empty and in steady state, moves a layer, milliseconds of a plan, microseconds of a split."""
    planner, layers = HomePlanner(devices, redundant), loads.shape[1]
    homes = flat_homes(loads[0].astype(np.float64), devices, redundant)
    plan = ReplicationPlan.at_home(homes, devices, redundant)
    balance, moves, plan_ms, split_us = [], [], [], []
    for step in range(1, len(loads)):
        forecast = forecaster.forecast(None, loads[:step])
        began = time.process_time()
        target = planner.plan(forecast, plan, loads[:step])
        plan_ms.append(1e3 * (time.process_time() - began) * MODEL_LAYERS / layers)
        moves.append(len(plan.moves_to(target)) / layers)
        plan, most = target, []
        began = time.process_time()
        for load, phy2log in zip(loads[step], plan.phy2log, strict=True):
            most.append(device_load(split_by_quota(load, phy2log, devices), devices).max())
        split_us.append(1e6 * (time.process_time() - began) / layers)
        balance.append((loads[step].sum(-1) / devices / most).mean())
    return {
        "from_empty": round(balance[0], 4), "steady": round(float(np.mean(balance[WARM:])), 4),
        "first_moves": moves[0], "moves": round(float(np.mean(moves[WARM:])), 2), "first_plan_ms": round(plan_ms[0], 1),
        "plan_ms": round(float(np.median(plan_ms[WARM:])), 1), "split_us": round(float(np.median(split_us[WARM:]))),
    }  # fmt: skip


def eplb(loads: IntArray, devices: int, redundant: int, past: int, nodes: int) -> float:
    """Balancedness of EPLB planned from the load `past` steps before, split evenly, in steady state."""
    slots, balance = loads.shape[2] + redundant, []
    for step in range(WARM + 1, len(loads)):
        weight: FloatArray = loads[step - past].astype(np.float64)
        phy2log, _, copies = rebalance_experts(weight, slots, 8 if nodes > 1 else 1, nodes, devices)
        each = np.take_along_axis(loads[step] / copies, np.asarray(phy2log, dtype=np.int64), axis=-1)
        largest = each.reshape(len(each), devices, -1).sum(-1).max(-1)
        balance.append((loads[step].sum(-1) / devices / largest).mean())
    return round(float(np.mean(balance)), 4)


def measure(loads: IntArray, devices: int, redundant: int, kind: str) -> list[dict[str, Any]]:
    """One row for each forecast."""
    nodes = devices // 8
    hierarchical = devices % 8 == 0 and nodes > 1 and 8 % nodes == 0 and loads.shape[2] % 8 == 0
    hierarchical = hierarchical and (loads.shape[2] + redundant) % devices == 0
    rows = []
    forecasters: list[Forecaster] = [Oracle(loads), LastBatch()]
    for past, forecaster in enumerate(forecasters):
        row: dict[str, Any] = {"devices": devices, "experts": loads.shape[2], "redundant": redundant, "loads": kind}
        row |= {"forecast": forecaster.name, **ours(loads, devices, redundant, forecaster)}
        row["eplb"] = eplb(loads, devices, redundant, past, 1)
        row["eplb_nodes"] = eplb(loads, devices, redundant, past, nodes) if hierarchical else None
        rows.append(row)
    return rows


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
    """Measures the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="*", help="sizes to measure; all of them by default")
    parser.add_argument("--redundant", type=int, help="replica slots, for recorded loads; one a device by default")
    parser.add_argument("--layers", type=int, default=4, help="layers of made-up loads")
    parser.add_argument("--loads", type=Path, help="recorded counts (.npz with `counts`)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    first_call_s = first_call()
    cases: list[tuple[IntArray, int, int, str]] = []
    for devices, experts, redundant in SHAPES:
        if options.devices and devices not in options.devices:
            continue
        if options.loads:
            counts = np.load(options.loads)["counts"].astype(np.int64)
            slots = devices if options.redundant is None else options.redundant
            cases.append((counts, devices, slots + -(counts.shape[2] + slots) % devices, options.loads.stem))
            continue
        for drifting in (True, False):
            loads = made_up(options.layers, experts, TOKENS * devices, drifting)
            cases.append((loads, devices, redundant, "drifting" if drifting else "changing"))
    rows = [row for case in track(cases, "sizes", console=Console(stderr=True)) for row in measure(*case)]
    table = Table(title=f"One thread; first plan after {first_call_s['plan']} s, first split {first_call_s['split']} s")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)
    print(json.dumps({"first_call_s": first_call_s, "results": rows}))


if __name__ == "__main__":
    main()
