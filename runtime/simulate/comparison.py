"""Compares replication policies on recorded loads and decides whether replication is worth it: `compare_policies`.

    from runtime.simulate import compare_policies
    report = compare_policies(loads, num_devices=8, num_redundant_experts=16)    # loads [steps, layers, experts]
    print(report["verdict"]["answer"])

A policy is a forecaster, a planner and a token split. No model is needed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from data.arrays import IntArray
from data.files import whole_file, write_json
from data.models.layout import MoELayout
from data.traces.loads import RecordedLoads, check_loads, read_loads
from predictor.baselines.history import LastBatch, Oracle
from predictor.baselines.own_past import OwnPast
from predictor.forecast import Forecaster, LoadForecast
from runtime.balancing.balancer import FORECASTERS
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner
from runtime.balancing.plan import ReplicationPlan, check_division, contiguous_homes, flat_homes
from runtime.balancing.planner import HomePlanner, Planner
from runtime.simulate.cost_model import DeviceTimes, measure
from runtime.simulate.replay import SPLITS, Replay, forecast_error, forecast_steps, replay
from runtime.simulate.report import document, plot
from runtime.simulate.step_size import StepSize, at_step_size
from runtime.simulate.verdict import TRAINED, verdict

FORECASTS = (*FORECASTERS, "own", "learned", "adaptive", "oracle", "exact")
FROM_TOKENS = (*TRAINED, "own")
"""Forecasts that read tokens or requests, which counts alone do not have."""
PLANNERS = ("contiguous", "eplb", "home")
SWITCH_BASE_EXPERT = 2 * 2 * 768 * 3072
"""Bytes of one expert of Switch-base in bf16."""


@dataclass(frozen=True)
class Settings:
    """Which policies are replayed, over which steps and devices; the fields are arguments of `compare_policies`."""

    num_devices: int
    num_redundant_experts: int
    forecasts: tuple[str, ...]
    planners: tuple[str, ...]
    splits: tuple[str, ...]
    predictor: Path | None
    start: int
    stop: int
    max_moves: int | None
    devices_per_node: int | None

    def home_planner(self, move_tokens: float = 0.0) -> HomePlanner:
        """Our planner with these limits."""
        return HomePlanner(
            self.num_devices, self.num_redundant_experts, self.max_moves, self.devices_per_node, move_tokens
        )


def compare_policies(
    loads: RecordedLoads | Path | str | IntArray,
    num_devices: int = 8,
    num_redundant_experts: int = 16,
    forecasts: Sequence[str] | None = None,
    planners: Sequence[str] = PLANNERS,
    splits: Sequence[str] = SPLITS,
    predictor: Path | str | None = None,
    start: int = 1,
    steps: int | None = None,
    hardware: DeviceTimes | None = None,
    max_moves: int | None = None,
    devices_per_node: int | None = None,
    tokens_per_step: float | None = None,
    *,
    out: Path | None = None,
    save_plans: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Replays every combination of forecaster, planner and split, and decides whether replication is worth it.

    Args:
        loads: Tokens of each expert, `[steps, L, E]`, or the path of a recording that `read_loads` reads.
        num_devices: Devices that the experts are spread over.
        num_redundant_experts: Replica slots of each layer over all devices.
        forecasts: Some of last, mean, ema, own, learned, adaptive, oracle and exact; by default all but exact, learned
            and adaptive only with a predictor, and own (each request's past) only where requests were served.
        planners: Some of contiguous (no replicas), eplb and home.
        splits: Some of even and quota.
        predictor: Folder that `train.py` wrote, for the forecasts `learned` and `adaptive`.
        start: First step that is planned; homes are chosen from the steps before it.
        steps: Number of steps to plan; by default all.
        hardware: What steps cost: `Hardware` with speeds of your own, or `gpu_times(...)`; by default this machine.
        max_moves: Most experts that the home planner moves before a step, over all layers; by default no limit.
        devices_per_node: Devices that share a fast network. The home planner then prefers copies within a node, the
            quota split keeps tokens there, and the report says how many moves and tokens stay within a node.
        tokens_per_step: Tokens of a step in the deployment that is asked about, see `at_step_size`; by default as
            recorded.
        out: Folder for balancedness.png and report.json; by default nothing is written.
        save_plans: File (.npz) for every plan and device load, and for `layers`, their numbers in the recording.
        console: Console for a progress bar.

    Returns:
        JSON document: loads, devices, redundant, steps, layers, left_out (how many `steps` and which `layers` hold no
        tokens, so that no figure counts them), results (one for each policy) and verdict.

    Raises:
        ValueError: If the loads, a name or a number cannot be used.
    """
    recorded = _recorded(loads)
    hardware = hardware or measure(expert_bytes_of(recorded.layout))
    top_k = hardware.top_k or (recorded.layout.experts_per_token if recorded.layout else 1)
    traffic = StepSize.of(recorded, top_k)
    if tokens_per_step is not None:
        recorded = at_step_size(recorded, tokens_per_step, top_k)
        traffic = StepSize.of(recorded, top_k, traffic.tokens_per_step)
    _, recorded_layers, num_experts = recorded.loads.shape
    check_division(num_experts, num_devices, num_redundant_experts)
    names = forecasts or _usual_forecasts(recorded, predictor is not None and tokens_per_step is None)
    settings = Settings(
        num_devices,
        num_redundant_experts,
        _known("forecast", names, FORECASTS),
        _known("planner", planners, PLANNERS),
        _known("split", splits, SPLITS),
        None if predictor is None else Path(predictor),
        *_span(start, steps, len(recorded.loads)),
        max_moves,
        devices_per_node,
    )
    if tokens_per_step is not None and (unable := [name for name in settings.forecasts if name in FROM_TOKENS]):
        raise ValueError(
            f"forecast {unable[0]} reads tokens, but tokens_per_step keeps counts alone; leave one of them out, or "
            "serve the requests of a trace with other --slots and --chunk"
        )
    replays = _replay_all(settings, recorded, hardware, console)
    contiguous = next(item for item in replays if item.planner == "contiguous")
    asked = [item for item in replays if item.planner in settings.planners]
    report: dict[str, Any] = {"loads": recorded.name, "devices": num_devices, "redundant": num_redundant_experts}
    report |= {"max_moves": max_moves, "devices_per_node": devices_per_node}
    silent = sorted(set(range(recorded_layers)) - set(recorded.layers.tolist()))
    report |= {"layers": len(recorded.layers), "left_out": {"steps": recorded.empty_steps, "layers": silent}}
    report |= document(asked, hardware.expert_bytes)
    if devices_per_node:
        for result, item in zip(report["results"], asked, strict=True):
            result |= {"near_moves": item.near_moves, "near_tokens": item.near_tokens}
    report["verdict"] = verdict(contiguous, replays, hardware) | {"traffic": asdict(traffic)}
    if "policy" in report["verdict"]:
        report["verdict"]["switch_on"] = _switch_on(report["verdict"]["policy"], settings, num_experts)
    if out:
        write_json(out / "report.json", report)
        plot(asked, start, out / "balancedness.png")
    if save_plans:
        _save_plans(asked, recorded.layers, save_plans)
    return report


def _recorded(loads: RecordedLoads | Path | str | IntArray) -> RecordedLoads:
    if isinstance(loads, RecordedLoads):
        return loads
    if isinstance(loads, (Path, str)):
        return read_loads(Path(loads))
    return RecordedLoads("array", check_loads(np.asarray(loads), Path("the array"))).with_tokens()


def _usual_forecasts(recorded: RecordedLoads, with_predictor: bool) -> list[str]:
    left_out = {"exact"} | (set(TRAINED) if not with_predictor else set())
    left_out |= {"own"} if recorded.sequences is None else set()
    return [name for name in FORECASTS if name not in left_out]


def _known(kind: str, names: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The names without repeats, refused if one is unknown; a single string is one name."""
    names = (names,) if isinstance(names, str) else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{kind}: unknown {', '.join(map(repr, unknown))}; choose from {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _span(start: int, steps: int | None, recorded: int) -> tuple[int, int]:
    """First step planned, and the step after the last.

    Raises:
        ValueError: If the loads have no such steps.
    """
    if recorded < 2:
        raise ValueError(
            f"{recorded} step with tokens was recorded, expected 2 or more: homes need one before the first"
        )
    if not 1 <= start < recorded:
        raise ValueError(f"start is {start}, expected 1 to {recorded - 1}: {recorded} steps were recorded")
    if steps is not None and not 1 <= steps <= recorded - start:
        raise ValueError(f"steps is {steps}, expected 1 to {recorded - start} after step {start}")
    return start, start + (steps or recorded - start)


def expert_bytes_of(layout: MoELayout | None) -> float:
    """Bytes of one expert in bf16: of the recorded model, or of Switch-base where its sizes are unknown."""
    return 2.0 * 2 * layout.d_model * layout.d_ff if layout and layout.d_model else SWITCH_BASE_EXPERT


def _replay_all(
    settings: Settings, recorded: RecordedLoads, hardware: DeviceTimes, console: Console | None
) -> list[Replay]:
    """All policies on the layers with tokens, the one without replicas first."""
    loads = recorded.loads[:, recorded.layers]
    _, num_layers, num_experts = loads.shape
    devices, redundant = settings.num_devices, settings.num_redundant_experts
    start, stop = settings.start, settings.stop
    order = contiguous_homes(num_layers, num_experts)
    known = loads[:start].sum(0).astype(np.float64)
    bare = ReplicationPlan.at_home(order, devices, 0)
    empty = ReplicationPlan.at_home(order, devices, redundant)
    flat = ReplicationPlan.at_home(flat_homes(known, devices, redundant), devices, redundant)
    home, exposed = settings.home_planner(), settings.home_planner(hardware.move_tokens)
    with Progress(console=console, transient=True, disable=console is None) as progress:
        names = [name for name in settings.planners if name != "contiguous"]
        total = (1 + len(settings.forecasts) * (1 + len(names))) * (stop - start)
        bar = progress.add_task("replay", total=total)

        def advancing(made: Iterator[LoadForecast]) -> Iterator[LoadForecast]:
            for forecast in made:
                progress.advance(bar)
                yield forecast

        def run(name: str, planner: Planner, made: Iterator[LoadForecast], first: ReplicationPlan) -> list[Replay]:
            splits = ["even"] if name == "contiguous" else list(settings.splits)
            steps = advancing(made)
            return replay((name, planner), steps, loads, first, start, stop, splits, settings.devices_per_node)

        unused = forecast_steps(LastBatch(), recorded, start, stop)
        replays = run("contiguous", ContiguousPlanner(), unused, bare)
        for forecast in settings.forecasts:
            forecaster = _open_forecaster(forecast, settings.predictor, recorded)
            began = time.perf_counter()
            made = list(advancing(forecast_steps(forecaster, recorded, start, stop)))
            forecast_ms = 1e3 * (time.perf_counter() - began) / len(made)
            own: list[Replay] = []
            if "eplb" in names:
                own += run("eplb", EplbPlanner(), iter(made), empty)
            if "home" in names:
                own += run("home", exposed if forecast == "exact" else home, iter(made), flat)
            load_tv = forecast_error(made, loads[start:stop])
            replays += [replace(item, load_tv=load_tv, forecast_ms=forecast_ms) for item in own]
    return replays


def _open_forecaster(name: str, predictor: Path | None, recorded: RecordedLoads) -> Forecaster:
    """The forecaster of that name.

    Raises:
        ValueError: If a trained forecast is asked for without a predictor or `own` without requests, or the predictor
            does not fit the loads.
    """
    if name in FORECASTERS:
        return FORECASTERS[name]
    if name in ("oracle", "exact"):
        return Oracle(recorded.loads, name)
    if name == "own":
        if recorded.sequences is None or recorded.layout is None:
            raise ValueError("forecast own needs requests: give a trace that names them, and --serve prefill or decode")
        return OwnPast(recorded.layout.experts_per_token)
    if predictor is None:
        raise ValueError(f"forecast {name} needs a predictor: give a folder that train.py wrote (--predictor)")
    from predictor.checkpoint import load_adaptive, load_predictor  # nothing else here needs the network's modules

    trained = (load_predictor if name == "learned" else load_adaptive)(predictor, recorded.layout)
    shape = trained.shape
    if recorded.loads.shape[1:] != shape:
        raise ValueError(f"{predictor} forecasts {shape} layers and experts, the loads have {recorded.loads.shape[1:]}")
    return trained


def _switch_on(policy: dict[str, str], settings: Settings, num_experts: int) -> str:
    """The command or the line of Python that switches a policy on."""
    devices, redundant = settings.num_devices, settings.num_redundant_experts
    if policy["planner"] == "eplb" and policy["split"] == "even":
        return (
            f"rebalance_experts(load, num_replicas={num_experts + redundant}, num_groups=1, num_nodes=1, "
            f"num_gpus={devices})"
        )
    if policy["forecast"] in TRAINED and (policy["planner"], policy["split"]) == ("home", "quota"):
        command = f"python -m runtime.infer --predictor {settings.predictor}"
        options = {"--devices": devices, "--redundant": redundant, "--max-moves": settings.max_moves}
        options["--devices-per-node"] = settings.devices_per_node
        return " ".join([command, *(f"{name} {value}" for name, value in options.items() if value is not None)])
    forecaster = "load_predictor(...)" if policy["forecast"] in TRAINED else repr(policy["forecast"])
    planner = {"planner": "EplbPlanner()"} if policy["planner"] == "eplb" else {"max_moves": settings.max_moves}
    given: dict[str, Any] = {**planner, "devices_per_node": settings.devices_per_node}
    more = "".join(f", {name}={value}" for name, value in given.items() if value is not None)
    split = "split_by_quota" if policy["split"] == "quota" else "split_evenly"
    return f"Balancer({devices}, {redundant}, {forecaster}{more}) with {split}"


def _save_plans(replays: list[Replay], layers: IntArray, path: Path) -> None:
    """Stores the plans and device loads of each result, named `<forecast>.<planner>.<split>.<array>`, and `layers`."""
    arrays: dict[str, npt.NDArray[Any]] = {"layers": layers}
    for item in replays:
        name = f"{item.forecast}.{item.planner}.{item.split}"
        arrays[f"{name}.phy2log"] = item.phy2log.astype(np.int16)
        arrays[f"{name}.device_load"] = item.device_load
    with whole_file(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
