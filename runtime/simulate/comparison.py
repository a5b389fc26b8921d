"""Replays recorded loads through forecasts, planners and splits, and says whether replication is worth it.

    python -m runtime.simulate outputs/traces/switch-mini-64 --devices 8 --redundant 16 --predictor outputs/predictor

LOADS is a trace folder, or a .npy or .npz (key `counts`) of [steps, layers, experts]. No model is needed. The last line
of stdout is one JSON document.
"""

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress

from data.cli import user_errors
from data.traces.loads import RecordedLoads, read_loads
from predictor.baselines.history import Ema, LastBatch, Oracle, RunningMean
from predictor.forecast import Forecaster, LoadForecast
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner
from runtime.balancing.plan import ReplicationPlan, check_division, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner
from runtime.simulate.cost_model import Hardware, measure, verdict
from runtime.simulate.replay import SPLITS, Planner, Replay, forecasts, replay
from runtime.simulate.report import document, plot, table

FORECASTS = ("last", "mean", "ema", "learned", "oracle", "exact")
PLANNERS = ("contiguous", "eplb", "home")
SWITCH_BASE_EXPERT = 2 * 2 * 768 * 3072
"""Bytes of one expert of Switch-base in bf16."""


class OneLineParser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Hands the message to `user_errors`."""
        raise ValueError(f"{message}; see --help")


def parse(arguments: list[str] | None = None) -> Namespace:
    """The command line."""

    def names(known: tuple[str, ...]) -> Any:
        def several(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [name for name in chosen if name not in known]:
                raise ValueError(f"unknown {', '.join(map(repr, unknown))}; choose from {', '.join(known)}")
            return list(dict.fromkeys(chosen))

        return several

    parser = OneLineParser(
        prog="python -m runtime.simulate",
        description="Replays recorded loads and says whether replication is worth it.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("loads", type=Path, help="trace folder, or .npy or .npz (key 'counts') of [steps, layers, experts]")
    add("--devices", type=int, default=8, help="devices that the experts are spread over")
    add("--redundant", type=int, default=16, help="replica slots of each layer over all devices")
    add("--forecast", type=str, help=f"some of {','.join(FORECASTS)}; 'exact' is the oracle with moves in the way")
    add("--planner", type=str, default=",".join(PLANNERS), help="some of these")
    add("--split", type=str, default="even,quota", help="some of these")
    add("--predictor", type=Path, help="folder that train.py wrote, for --forecast learned")
    add("--start", type=int, default=1, help="first step that is planned; homes are chosen from those before it")
    add("--steps", type=int, help="steps to plan; all by default")
    add("--save-plans", type=Path, metavar="FILE.npz", help="store phy2log [N, L, P] and device_load [N, L, G]")
    add("--out", type=Path, default=Path("outputs/simulate"), help="folder for the plot and the JSON document")
    add("--expert-bytes", type=float, help="bytes of one expert; from the trace, or a Switch-base expert in bf16")
    add("--tokens-per-second", type=float, help="tokens an expert's device computes; measured here by default")
    add("--link-bytes-per-second", type=float, help="bytes a device can receive; measured here by default")
    add(
        "--expert-overhead-tokens",
        type=float,
        help="tokens computed while one more expert is read; measured by default",
    )
    options = parser.parse_args(arguments)
    options.forecast = names(FORECASTS)(options.forecast or default_forecasts(options.predictor))
    options.planner, options.split = names(PLANNERS)(options.planner), names(tuple(SPLITS))(options.split)
    return options


def default_forecasts(predictor: Path | None) -> str:
    """All that need no predictor, and the learned one where there is one."""
    return "last,mean,ema,learned,oracle" if predictor else "last,mean,ema,oracle"


def simulate(options: Namespace, console: Console) -> dict[str, Any]:
    """Replays every policy, saves what was asked for, and returns the JSON document."""
    recorded = read_loads(options.loads)
    start, stop = span(options, len(recorded.loads))
    hardware = describe_hardware(options, recorded)
    replays = replay_all(options, recorded, hardware, start, stop, console)
    contiguous = next(item for item in replays if item.planner == "contiguous")
    asked = [item for item in replays if item.planner in options.planner]
    report = document(asked, hardware.expert_bytes) | {"verdict": verdict(contiguous, replays, hardware)}
    report = {"loads": recorded.name, "devices": options.devices, "redundant": options.redundant} | report
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(asked, start, options.out / "balancedness.png")
    if options.save_plans:
        save_plans(asked, options.save_plans)
    return report


def span(options: Namespace, recorded: int) -> tuple[int, int]:
    """First step planned, and the one after the last.

    Raises:
        ValueError: If the loads have no such steps.
    """
    if not 1 <= options.start < recorded:
        raise ValueError(f"--start is {options.start}, expected 1 to {recorded - 1}: {recorded} steps were recorded")
    if options.steps is not None and not 1 <= options.steps <= recorded - options.start:
        raise ValueError(
            f"--steps is {options.steps}, expected 1 to {recorded - options.start} after step {options.start}"
        )
    return options.start, options.start + (options.steps or recorded - options.start)


def describe_hardware(options: Namespace, recorded: RecordedLoads) -> Hardware:
    """The hardware as given, the rest of it measured."""
    layout = recorded.layout
    of_trace = 2.0 * 2 * layout.d_model * layout.d_ff if layout else SWITCH_BASE_EXPERT
    expert_bytes = options.expert_bytes if options.expert_bytes is not None else of_trace
    given = (options.tokens_per_second, options.link_bytes_per_second, options.expert_overhead_tokens)
    if None not in given:
        return Hardware(expert_bytes, *given)
    here = measure(expert_bytes)
    names = ("tokens_per_second", "bytes_per_second", "expert_overhead_tokens")
    return Hardware(
        expert_bytes,
        *(getattr(here, name) if value is None else value for name, value in zip(names, given, strict=True)),
    )


def replay_all(
    options: Namespace, recorded: RecordedLoads, hardware: Hardware, start: int, stop: int, console: Console
) -> list[Replay]:
    """All policies, the one without replicas first."""
    _, num_layers, num_experts = recorded.loads.shape
    check_division(num_experts, options.devices, options.redundant)
    order = contiguous_homes(num_layers, num_experts)
    bare = ReplicationPlan.at_home(order, options.devices, 0)
    rooms = ReplicationPlan.at_home(order, options.devices, options.redundant)
    known = recorded.loads[:start].sum(0).astype(np.float64)
    flat = ReplicationPlan.at_home(flat_homes(known, options.devices), options.devices, options.redundant)
    home = HomePlanner(options.devices, options.redundant)
    exposed = HomePlanner(options.devices, options.redundant, move_tokens=hardware.move_tokens)
    with Progress(console=console, transient=True) as progress:
        names = [name for name in options.planner if name != "contiguous"]
        bar = progress.add_task("replay", total=(1 + len(options.forecast) * (1 + len(names))) * (stop - start))

        def steps(made: Iterator[LoadForecast]) -> Iterator[LoadForecast]:
            for forecast in made:
                progress.advance(bar)
                yield forecast

        def run(name: str, planner: Planner, made: Iterator[LoadForecast], first: ReplicationPlan) -> list[Replay]:
            splits = ["even"] if name == "contiguous" else options.split
            return replay((name, planner), steps(made), recorded.loads, first, start, stop, splits)

        nothing = forecasts(LastBatch(), recorded.loads, None, start, stop)
        replays = run("contiguous", ContiguousPlanner(), nothing, bare)
        for forecast in options.forecast:
            forecaster = open_forecaster(forecast, options.predictor, recorded)
            made = list(steps(forecasts(forecaster, recorded.loads, recorded.batches, start, stop)))
            if "eplb" in names:
                replays += run("eplb", EplbPlanner(), iter(made), rooms)
            if "home" in names:
                replays += run("home", exposed if forecast == "exact" else home, iter(made), flat)
    return replays


def open_forecaster(name: str, predictor: Path | None, recorded: RecordedLoads) -> Forecaster:
    """The forecaster of that name.

    Raises:
        ValueError: If the learned one is asked for without a predictor, or its predictor does not fit the loads.
    """
    if name == "last":
        return LastBatch()
    if name == "mean":
        return RunningMean()
    if name == "ema":
        return Ema()
    if name in ("oracle", "exact"):
        return Oracle(recorded.loads, name)
    if predictor is None:
        raise ValueError("--forecast learned needs --predictor: a folder that train.py wrote")
    from predictor.checkpoint import load_predictor  # only here: nothing else needs its network

    learned = load_predictor(predictor, recorded.layout)
    shape = (learned.layout.num_layers, learned.layout.num_experts)
    if recorded.loads.shape[1:] != shape:
        raise ValueError(f"{predictor} forecasts {shape} layers and experts, the loads have {recorded.loads.shape[1:]}")
    return learned


def save_plans(replays: list[Replay], path: Path) -> None:
    """Stores the plans and device loads of each result, named `<forecast>.<planner>.<split>.<array>`."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for item in replays:
        name = f"{item.forecast}.{item.planner}.{item.split}"
        arrays[f"{name}.phy2log"] = item.phy2log.astype(np.int16)
        arrays[f"{name}.device_load"] = item.device_load
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def main() -> None:
    """Command line: a table, then one JSON document."""
    torch.set_num_threads(1)
    with user_errors():
        options = parse()
        report = simulate(options, Console(stderr=True))
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table(report))
        answer = report["verdict"]
        console.print(f"Verdict: [bold]{answer['answer']}[/bold]. {answer['why']}.")
        print(json.dumps(report))


if __name__ == "__main__":
    main()
