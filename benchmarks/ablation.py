"""Where the gain over several devices comes from: one part after the other is switched on, on held-out batches.

    python -m benchmarks.ablation                                                          # the bundled Switch model
    python -m benchmarks.ablation --trace outputs/traces/qwen3-mini-64 --predictor outputs/qwen3-mini-64/predictor

Replays the test batches of the trace that the predictor was trained on over 8 devices, in their place in the stream:
the batches between them are replayed too, and count in no figure. Each row keeps the parts of the rows above it:

- no replicas: experts in order, spread evenly over the devices;
- replicas: EPLB's, planned anew from the last batch, tokens split evenly over copies;
- our planner: homes stay, replicas move;
- exact split: quotas that make the largest device load least;
- forecast: the network's in place of the last batch;
- calibrated spread: the planner also levels what the forecast's errors may bring;
- adaptation: the forecast goes on learning from the batches that ran;
- the true load: what a perfect forecast would reach.

Prints balancedness by part of the stream, with 95 % block bootstrap intervals over all batches, and the experts moved a
layer and batch; in a pipe, the last line is JSON. One device and a memory budget: `benchmarks.paper_speed` and
`benchmarks.tiers`, whose arms are ablations of their own.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.cli import print_json, user_errors
from data.traces.load_stream import LoadStream, open_stream
from data.traces.store import open_trace
from predictor.baselines.history import LastBatch
from predictor.checkpoint import load_adaptive, load_predictor
from predictor.evaluation.bootstrap import resampled
from predictor.forecast import Forecaster, LoadForecast, LoadHistory
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.balancing.planner import HomePlanner, Planner
from runtime.simulate.cost_model import Hardware
from runtime.simulate.forecasters import TrueLoad
from runtime.simulate.outcome import Outcome
from runtime.simulate.replay import Setting, replay

DEVICES = 8
Names = np.ndarray[Any, Any]
HARDWARE = Hardware(1.0, 1.0, 1.0, 0.0)
"""Times are no part of this benchmark."""


@dataclass(frozen=True)
class WithoutSpread:
    """A forecaster whose spread is not told."""

    wrapped: Forecaster
    name: str = "learned"

    def forecast(self, upcoming: Any, history: LoadHistory) -> LoadForecast:
        """The forecast alone."""
        made = self.wrapped.forecast(upcoming, history)
        return replace(made, spread=np.zeros_like(made.spread))


@dataclass(frozen=True)
class Part:
    """One row: what is switched on."""

    name: str
    forecaster: Forecaster
    planner: str
    split: str


def parts(predictor: Path, stream: LoadStream) -> list[Part]:
    """All rows, in order."""
    last, learned = WithoutSpread(LastBatch(), "last"), load_predictor(predictor, stream.layout)
    return [
        Part("no replicas", last, "contiguous", "even"),
        Part("+ replicas (EPLB)", last, "eplb", "even"),
        Part("+ our planner", last, "home", "even"),
        Part("+ exact split", last, "home", "quota"),
        Part("+ forecast", WithoutSpread(learned), "home", "quota"),
        Part("+ calibrated spread", learned, "home", "quota"),
        Part("+ adaptation", load_adaptive(predictor, stream.layout), "home", "quota"),
        Part("the true load", TrueLoad("oracle"), "home", "quota"),
    ]


def planner_of(name: str, shape: tuple[int, int], redundant: int) -> tuple[Planner, ReplicationPlan]:
    """A planner, and the plan before the first batch: all experts in order."""
    slots = 0 if name == "contiguous" else redundant
    first = ReplicationPlan.at_home(contiguous_homes(*shape), DEVICES, slots)
    planners: dict[str, Planner] = {
        "contiguous": ContiguousPlanner(), "eplb": EplbPlanner(), "home": HomePlanner(DEVICES, redundant)
    }  # fmt: skip
    return planners[name], first


def measure(trace: Path, predictor: Path, redundant: int) -> dict[str, Any]:
    """Replays every part."""
    stream, stored = open_stream(trace), open_trace(trace)
    splits = stored.splits
    if stream.empty_steps or "test" not in splits:
        raise ValueError(f"{trace} has no test batches, or batches without tokens; collect it with `data.collect`")
    start, shape = splits.index("test"), (len(stream.layers), stream.num_experts)
    phases = np.array([each.phase for each in replace(stored, only="test").traces()])
    held_out = np.array([split == "test" for split in splits[start:]])
    rows, all_parts = [], parts(predictor, stream)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("parts", total=len(all_parts) * (len(splits) - start))
        for part in all_parts:
            setting = Setting(start, len(splits), [part.split], HARDWARE)
            planners = {part.planner: planner_of(part.planner, shape, redundant)}
            (outcome,) = replay(part.forecaster, planners, stream, setting, lambda: progress.advance(bar))
            rows.append({"part": part.name} | figures(outcome, held_out, phases))
    return {"trace": str(trace), "devices": DEVICES, "redundant": redundant, "batches": len(phases), "rows": rows}


def figures(outcome: Outcome, held_out: Names, phases: Names) -> dict[str, Any]:
    """Balancedness over all test batches and in each part of the stream; moves.

    Args:
        outcome: What a part did from the first test batch on.
        held_out: Which of these batches are test batches.
        phases: The part of the stream of each test batch.
    """
    balance = outcome.balance[held_out]
    low, high = np.quantile(balance[resampled(len(balance))].mean(-1), [0.025, 0.975])
    return {
        "balancedness": round(float(balance.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)],
        "phases": {str(phase): round(float(balance[phases == phase].mean()), 4) for phase in dict.fromkeys(phases)},
        "moves_per_layer": round(float(outcome.arrivals[held_out].mean()) / outcome.shape[0], 2),
    }  # fmt: skip


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the rows."""
    phases = list(report["rows"][0]["phases"])
    table = Table(
        title=f"Balancedness on {report['batches']} held-out batches of {Path(report['trace']).name}, "
        f"{report['devices']} devices, {report['redundant']} replica slots a layer"
    )
    for column in ("part", "all batches", "gain", *phases, "moves"):
        table.add_column(column, justify="left" if column == "part" else "right")
    before = None
    for row in report["rows"]:
        gain = "" if before is None else f"{row['balancedness'] - before:+.3f}"
        table.add_row(
            row["part"], "{:.3f} [{:.3f}, {:.3f}]".format(row["balancedness"], *row["interval"]), gain,
            *(f"{row['phases'][phase]:.3f}" for phase in phases), f"{row['moves_per_layer']:.1f}",
        )  # fmt: skip
        before = row["balancedness"]
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("outputs/traces/switch-mini-64"))
    parser.add_argument("--predictor", type=Path, default=Path("outputs/predictor"))
    parser.add_argument("--redundant", type=int, default=16, help="replica slots of a layer over all devices")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors():
        report = measure(given.trace, given.predictor, given.redundant)
    report |= {"predictor": str(given.predictor), "torch": torch.__version__}
    show(report, Console(width=None if sys.stdout.isatty() else 140))
    print_json(report)


if __name__ == "__main__":
    main()
