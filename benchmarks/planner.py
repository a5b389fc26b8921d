"""Placement at production size: balancedness, moves and time of plans and splits, ours beside EPLB's, on one thread.

    python -m benchmarks.planner                                    # all sizes, 4 layers of each
    python -m benchmarks.planner --devices 64 256 --layers 58       # whole models, for times
    python -m benchmarks.planner --devices 8 --redundant 16 --loads tests/runtime/recorded/gptoss20b.npz

Loads follow Zipf shares of exponent .7 that drift at every step, or are drawn in a new order every ten steps, with
1,024 tokens a device; or they are recorded. The recorded loads of the table are counts `[steps, layers, experts]` of
gpt-oss-20b and DeepSeek-V2-Lite, folded to the experts of each size: layers stand side by side as one layer of more
experts, if needed beside later steps of the same layers, and counts are multiplied to about 1,024 tokens a device.

Each step is planned from its true load (oracle), from the last batch, or by an `AdaptiveForecaster` around it, which
knows no tokens. *From empty* is the balancedness under the first plan, *steady* the mean after the first five steps,
*moves* are experts copied a layer and step, by plans with fixed homes (*ours*) and with homes that move (*moving*). The
greedy rival has fixed homes and our split. EPLB splits evenly, by its global policy and, where nodes of 8 devices
divide, by its hierarchical one (*nodes*) with 8 groups of experts, each on one node; *in groups* are our plans with the
same groups. Times are processor time: medians after the first five steps, those of a plan scaled to 58 layers. Prints a
table and, in a pipe, one line of JSON with all figures. `first_call_s` is the time of the first plan and split, which
compile the kernels or read them from numba's cache (NUMBA_CACHE_DIR=$(mktemp -d) starts with an empty cache).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.greedy import GreedyPlanner
from data.arrays import FloatArray, IntArray
from data.cli import print_json
from predictor.adaptive import AdaptiveForecaster
from predictor.baselines.history import LastBatch, Oracle
from predictor.forecast import Forecaster, OnlineForecaster
from runtime.balancing.eplb import rebalance_experts
from runtime.balancing.plan import ReplicationPlan, flat_homes
from runtime.balancing.planner import HomePlanner, Planner
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
NODE = GROUPS = 8
"""Devices of a node, and groups of experts, where they are compared."""
MODEL_LAYERS = 58
"""MoE layers of DeepSeek-V3, to which the time of a plan is scaled."""
RECORDED = {"gpt-oss": "gptoss20b", "DeepSeek": "dsv2lite"}
"""Recorded counts in tests/runtime/recorded, by their name in the table."""
COLUMNS = {
    "loads": "loads", "forecast": "forecast", "from_empty": "from empty", "steady": "ours", "moves": "moves",
    "plan_ms": "ms", "moving": "moving", "moving_moves": "moves", "moving_plan_ms": "ms", "greedy": "greedy",
    "greedy_moves": "moves", "eplb": "EPLB", "eplb_moves": "moves", "eplb_nodes": "nodes", "in_groups": "in groups",
    "in_groups_moves": "moves", "split_us": "split us",
}  # fmt: skip
"""Heads of the table's columns, by the field of a row."""


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


def folded(counts: IntArray, experts: int, tokens: int) -> IntArray:
    """Recorded counts `[N, L, E]` as one layer of more experts and tokens, `[N / parts, 1, experts]`.

    The first E experts are layer 0, the next ones layer 1; after the last layer comes layer 0 again, in later steps.
    """
    steps, layers, each = counts.shape
    pieces = -(-experts // each)
    parts = -(-pieces // layers)
    length = steps // parts
    side = [counts[part * length : (part + 1) * length, layer] for part in range(parts) for layer in range(layers)]
    load = np.concatenate(side[:pieces], axis=-1)[:, :experts].astype(np.int64)
    return np.asarray(load * max(1, round(tokens / load.sum(-1).mean())))[:, None]


def replay(
    loads: IntArray, planner: Planner, devices: int, redundant: int, forecaster: Forecaster, groups: int | None = None
) -> dict[str, float]:
    """Balancedness from empty and in steady state, moves a layer, milliseconds of a plan, microseconds of a split."""
    layers = loads.shape[1]
    nodes = None if groups is None else NODE
    homes = flat_homes(loads[0].astype(np.float64), devices, redundant, num_groups=groups, devices_per_node=nodes)
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
        if isinstance(forecaster, OnlineForecaster):
            forecaster.observe(None, loads[step])
    return {
        "from_empty": round(balance[0], 4), "steady": round(float(np.mean(balance[WARM:])), 4),
        "first_moves": moves[0], "moves": round(float(np.mean(moves[WARM:])), 2), "first_plan_ms": round(plan_ms[0], 1),
        "plan_ms": round(float(np.median(plan_ms[WARM:])), 1), "split_us": round(float(np.median(split_us[WARM:]))),
    }  # fmt: skip


def eplb(loads: IntArray, devices: int, redundant: int, forecaster: Forecaster, nodes: int) -> tuple[float, float]:
    """Balancedness of EPLB, split evenly, and its moves a layer, in steady state."""
    slots, balance, moves, before = loads.shape[2] + redundant, [], [], None
    for step in range(1, len(loads)):
        weight: FloatArray = forecaster.forecast(None, loads[:step]).load.astype(np.float64)
        phy2log, _, copies = rebalance_experts(weight, slots, GROUPS if nodes > 1 else 1, nodes, devices)
        each = np.take_along_axis(loads[step] / copies, np.asarray(phy2log, dtype=np.int64), axis=-1)
        largest = each.reshape(len(each), devices, -1).sum(-1).max(-1)
        balance.append((loads[step].sum(-1) / devices / largest).mean())
        moves.append(0.0 if before is None else (phy2log != before).sum(-1).mean())
        before = phy2log
        if isinstance(forecaster, OnlineForecaster):
            forecaster.observe(None, loads[step])
    return round(float(np.mean(balance[WARM:])), 4), round(float(np.mean(moves[WARM:])), 2)


def forecaster_of(name: str, loads: IntArray) -> Forecaster:
    """A forecaster that has seen nothing yet."""
    if name == "adaptive":
        return AdaptiveForecaster(LastBatch(), loads.shape[1], loads.shape[2])
    return Oracle(loads) if name == "oracle" else LastBatch()


def measure(loads: IntArray, devices: int, redundant: int, kind: str) -> list[dict[str, Any]]:
    """One row for each forecast."""
    nodes = devices // NODE
    hierarchical = devices % NODE == 0 and nodes > 1 and GROUPS % nodes == 0 and loads.shape[2] % GROUPS == 0
    hierarchical = hierarchical and (loads.shape[2] + redundant) % devices == 0
    rivals: dict[str, Planner] = {
        "moving": HomePlanner(devices, redundant, moving_homes=True), "greedy": GreedyPlanner()
    }  # fmt: skip
    rows = []
    for name in ("oracle", "last", "adaptive"):
        size = devices, redundant
        row: dict[str, Any] = {"devices": devices, "experts": loads.shape[2], "redundant": redundant, "loads": kind}
        row |= {"forecast": name, **replay(loads, HomePlanner(*size), *size, forecaster_of(name, loads))}
        row["eplb"], row["eplb_moves"] = eplb(loads, *size, forecaster_of(name, loads), 1)
        row |= dict.fromkeys(("eplb_nodes", "eplb_nodes_moves", "in_groups", "in_groups_moves"))
        if hierarchical:
            row["eplb_nodes"], row["eplb_nodes_moves"] = eplb(loads, *size, forecaster_of(name, loads), nodes)
            grouped = HomePlanner(*size, devices_per_node=NODE, num_groups=GROUPS)
            found = replay(loads, grouped, *size, forecaster_of(name, loads), GROUPS)
            row["in_groups"], row["in_groups_moves"] = found["steady"], found["moves"]
        for rival, planner in rivals.items():
            found = replay(loads, planner, *size, forecaster_of(name, loads))
            row |= {rival: found["steady"], f"{rival}_from_empty": found["from_empty"]}
            row |= {f"{rival}_moves": found["moves"], f"{rival}_plan_ms": found["plan_ms"]}
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
    console = Console(width=None if sys.stdout.isatty() else 190)
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
        for kind, name in RECORDED.items():
            with np.load(f"tests/runtime/recorded/{name}.npz") as recorded:
                cases.append((folded(recorded["counts"], experts, TOKENS * devices), devices, redundant, kind))
    rows = [row for case in track(cases, "sizes", console=Console(stderr=True)) for row in measure(*case)]
    table = Table(title=f"One thread; first plan after {first_call_s['plan']} s, first split {first_call_s['split']} s")
    for name in ("G, E, R", *COLUMNS.values()):
        table.add_column(name, justify="right")
    for row in rows:
        size = f"{row['devices']}, {row['experts']}, {row['redundant']}"
        table.add_row(size, *("" if row[name] is None else str(row[name]) for name in COLUMNS))
    console.print(table)
    print_json({"first_call_s": first_call_s, "results": rows})


if __name__ == "__main__":
    main()
