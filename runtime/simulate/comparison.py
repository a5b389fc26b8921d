"""Compares replication policies on recorded loads and decides whether replication is worth it: `compare_policies`.

    from runtime.simulate import compare_policies
    report = compare_policies(loads, num_devices=8, num_redundant_experts=16)    # loads [steps, layers, experts]
    print(report["verdict"]["answer"])

A policy is a forecaster, a planner and a token split. No model is needed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from data.arrays import FloatArray, IntArray
from data.files import whole_file, write_json
from data.models.layout import MoELayout
from data.progress import progress
from data.traces.load_stream import LoadStream, Recorded, as_stream
from predictor.baselines.history import LastBatch
from runtime.balancing.eplb import ContiguousPlanner, EplbPlanner
from runtime.balancing.nodes import check_groups
from runtime.balancing.plan import ReplicationPlan, check_division, contiguous_homes, flat_homes
from runtime.balancing.planner import BETWEEN_NODES, HomePlanner, Planner
from runtime.simulate.cost_model import DeviceTimes, Hardware, measure
from runtime.simulate.forecasters import FORECASTS, FROM_TOKENS, TRAINED, open_forecaster, usual_forecasts
from runtime.simulate.kept_plan import in_engines, kept_plans
from runtime.simulate.outcome import Outcome
from runtime.simulate.picture import plot
from runtime.simulate.replay import SPLITS, Setting, replay
from runtime.simulate.report import document
from runtime.simulate.step_size import StepSize, at_step_size
from runtime.simulate.verdict import verdict

PLANNERS = ("contiguous", "eplb", "home")
"""Planners that are compared by default."""
KNOWN_PLANNERS = (*PLANNERS, "moving", "timed")
RENEW_EVERY = 100
"""Steps between the plans of an engine that renews them; SGLang's default is 1,000 and vLLM's 3,000."""
SWITCH_BASE_EXPERT = 2 * 2 * 768 * 3072
"""Bytes of one expert of Switch-base in bf16."""


@dataclass(frozen=True)
class Policies:
    """Which policies are replayed, on which devices; the fields are arguments of `compare_policies`."""

    num_devices: int
    num_redundant_experts: int
    forecasts: tuple[str, ...]
    planners: tuple[str, ...]
    predictor: Path | None
    max_moves: int | None
    devices_per_node: int | None
    expert_overhead_tokens: int
    num_groups: int | None = None
    between_nodes: float = BETWEEN_NODES

    @property
    def groups(self) -> tuple[int, int]:
        """Groups and nodes, as EPLB counts them: without groups one group on one node."""
        if self.num_groups is None or self.devices_per_node is None:
            return 1, 1
        return self.num_groups, self.num_devices // self.devices_per_node

    def with_replicas(
        self, known_LE: FloatArray, move_tokens: float, exposed: bool
    ) -> dict[str, tuple[Planner, ReplicationPlan]]:
        """The planners that replicate, each with the plan before the first step.

        Args:
            known_LE: Loads of the steps before it, from which the home planner chooses homes.
            move_tokens: Tokens that a device computes in the time one expert moves.
            exposed: Whether moves delay the batch, so that their price counts.
        """
        devices, redundant = self.num_devices, self.num_redundant_experts
        empty = ReplicationPlan.at_home(contiguous_homes(*known_LE.shape), devices, redundant)
        homes = flat_homes(
            known_LE, devices, redundant, num_groups=self.num_groups, devices_per_node=self.devices_per_node
        )
        flat = ReplicationPlan.at_home(homes, devices, redundant)
        home = HomePlanner(
            devices, redundant, self.max_moves, self.devices_per_node, move_tokens if exposed else 0.0,
            num_groups=self.num_groups, between_nodes=self.between_nodes,
        )  # fmt: skip
        known: dict[str, tuple[Planner, ReplicationPlan]] = {
            "eplb": (EplbPlanner(*self.groups), empty), "home": (home, flat),
            "moving": (replace(home, moving_homes=True), flat),
            "timed": (replace(home, expert_overhead_tokens=self.expert_overhead_tokens), flat),
        }  # fmt: skip
        return {name: planner for name, planner in known.items() if name in self.planners}


def compare_policies(
    loads: Recorded,
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
    renew_every: int = RENEW_EVERY,
    *,
    num_groups: int | None = None,
    out: Path | None = None,
    save_plans: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Replays every combination of forecaster, planner and split, and decides whether replication is worth it.

    Args:
        loads: Tokens of each expert, `[steps, L, E]`, or the path of a recording that `data.traces.loads` lists. A
            trace of counts is read shard by shard, once for each forecast, so that it need not fit memory.
        num_devices: Devices that the experts are spread over.
        num_redundant_experts: Replica slots of each layer over all devices.
        forecasts: Some of last, mean, ema, own, learned, adaptive, oracle and exact; by default all but exact, learned
            and adaptive only with a predictor, and own (each request's past) only where requests were served.
        planners: Some of contiguous (no replicas), eplb, home, moving (as home, but homes move) and timed (as home, but
            planner and quota split count the hardware's `expert_overhead_tokens`); by default the first three.
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
        renew_every: Steps between the plans of an engine that renews them, see `runtime.simulate.kept_plan`.
        num_groups: Groups of consecutive experts that stay on one node, copies included; for all planners.
        out: Folder for balancedness.png and report.json; by default nothing is written.
        save_plans: File (.npz) for every plan and device load, for home slots where devices have different numbers of
            homes or homes move, and for `layers`, their numbers in the recording; all of them are kept in memory.
        console: Console for a progress bar.

    Returns:
        JSON document: loads, devices, redundant, experts, steps, layers, left_out (how many `steps` and which `layers`
        hold no tokens, so that no figure counts them), results (one for each policy), verdict, and engines (what plans
        save that are kept; None where a device has more slots than there are experts).

    Raises:
        ValueError: If the loads, a name or a number cannot be used.
    """
    stream = as_stream(loads)
    hardware = hardware or measure(expert_bytes_of(stream.layout))
    top_k = hardware.top_k or (stream.layout.experts_per_token if stream.layout else 1)
    traffic = StepSize.of(stream, top_k)
    if tokens_per_step is not None:
        stream = at_step_size(stream, tokens_per_step, top_k)
        traffic = StepSize.of(stream, top_k, traffic.tokens_per_step)
    num_experts = stream.num_experts
    check_division(num_experts, num_devices, num_redundant_experts)
    check_groups(num_groups, num_devices, devices_per_node, num_experts)
    names = forecasts or usual_forecasts(stream, predictor is not None and tokens_per_step is None)
    policies = Policies(
        num_devices,
        num_redundant_experts,
        _known("forecast", names, FORECASTS),
        _known("planner", planners, KNOWN_PLANNERS),
        None if predictor is None else Path(predictor),
        max_moves,
        devices_per_node,
        round(hardware.expert_overhead_tokens) if isinstance(hardware, Hardware) else 0,
        num_groups,
        hardware.between_nodes,
    )
    if "timed" in policies.planners and not policies.expert_overhead_tokens:
        raise ValueError(
            "planner timed counts the time of one more expert in tokens, and this hardware has none: give "
            "--expert-overhead-tokens of 1 or more, without --gpu"
        )
    if tokens_per_step is not None and (unable := [name for name in policies.forecasts if name in FROM_TOKENS]):
        raise ValueError(
            f"forecast {unable[0]} reads tokens, but tokens_per_step keeps counts alone; leave one of them out, or "
            "serve the requests of a trace with other --slots and --chunk"
        )
    if renew_every < 1:
        raise ValueError(f"renew_every is {renew_every}, expected 1 or more")
    span = _span(start, steps, stream.num_steps)
    splits = _known("split", splits, SPLITS)
    hardware.check(stream, num_devices, (num_experts + num_redundant_experts) // num_devices)
    setting = Setting(*span, splits, hardware, devices_per_node, keep_plans=save_plans is not None)
    outcomes, kept = _replay_all(policies, stream, setting, hardware.move_tokens, renew_every, console)
    asked = [item for item in outcomes if item.planner in policies.planners]
    report: dict[str, Any] = {"loads": stream.name, "devices": num_devices, "redundant": num_redundant_experts}
    report |= {"experts": num_experts, "max_moves": max_moves, "devices_per_node": devices_per_node}
    report |= {"groups": num_groups}
    silent = sorted(set(range(stream.num_layers)) - set(stream.layers.tolist()))
    report |= {"layers": len(stream.layers), "left_out": {"steps": stream.empty_steps, "layers": silent}}
    report |= document(asked, hardware.expert_bytes)
    if devices_per_node:
        for result, item in zip(report["results"], asked, strict=True):
            result |= {"near_moves": item.near_moves, "near_tokens": item.near_tokens}
    report["verdict"] = verdict(outcomes[0], outcomes, hardware) | {"traffic": asdict(traffic)}
    if "policy" in report["verdict"]:
        report["verdict"]["switch_on"] = _switch_on(report["verdict"]["policy"], policies, num_experts)
    report["engines"] = None
    if kept:
        command = f"switchcast export {stream.name} --devices {num_devices} --redundant {num_redundant_experts}"
        layers = "" if stream.layout and stream.layout.causal else " --model FOLDER"  # which the rows are for
        export = f"{command} --to sglang{layers}"
        written = export if Path(stream.name).exists() and num_groups is None else None  # it knows no groups
        report["engines"] = in_engines(outcomes[0], kept, hardware, renew_every) | {"export": written}
    if out:
        write_json(out / "report.json", report)
        plot(asked, report, start, out / "balancedness.png")
    if save_plans:
        _save_plans(asked, stream.layers, save_plans)
    return report


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
    policies: Policies,
    stream: LoadStream,
    setting: Setting,
    move_tokens: float,
    renew_every: int,
    console: Console | None,
) -> tuple[list[Outcome], list[Outcome]]:
    """All policies on the layers with tokens, the one without replicas first; and the plans that are kept."""
    known: FloatArray = np.zeros((len(stream.layers), stream.num_experts))
    for step in islice(stream.steps(), setting.start):
        known += step.load[stream.layers]
    devices, redundant, steps = policies.num_devices, policies.num_redundant_experts, setting.stop - setting.start
    homes = contiguous_homes(*known.shape)
    evenly = replace(setting, splits=["even"], keep_plans=False)
    kept: dict[str, tuple[Planner, ReplicationPlan]] = {}
    if (stream.num_experts + redundant) // devices <= stream.num_experts:
        kept = kept_plans(steps, ReplicationPlan.at_home(homes, devices, redundant), renew_every, *policies.groups)
    with progress(console, transient=True) as bars:
        bar = bars.add_task("replay", total=(2 + len(policies.forecasts)) * steps)

        def advance() -> None:
            bars.advance(bar)

        spare = -stream.num_experts % devices  # empty slots of the devices that have an expert less
        bare = {"contiguous": (ContiguousPlanner(), ReplicationPlan.at_home(homes, devices, spare))}
        outcomes = replay(LastBatch(), bare, stream, replace(setting, splits=["even"]), advance)
        for name in policies.forecasts:
            forecaster = open_forecaster(name, policies.predictor, stream, setting.start)
            planners = policies.with_replicas(known, move_tokens, exposed=name == "exact")
            outcomes += replay(forecaster, planners, stream, setting, advance)
        mean = open_forecaster("mean", None, stream, setting.start)
        return outcomes, replay(mean, kept, stream, evenly, advance)


def _switch_on(policy: dict[str, str], policies: Policies, num_experts: int) -> str:
    """The command or the line of Python that switches a policy on."""
    devices, redundant = policies.num_devices, policies.num_redundant_experts
    if policy["planner"] == "eplb" and policy["split"] == "even":
        groups, nodes = policies.groups
        return (
            f"rebalance_experts(load, num_replicas={num_experts + redundant}, num_groups={groups}, num_nodes={nodes}, "
            f"num_gpus={devices})"
        )
    price = policies.expert_overhead_tokens if policy["planner"] == "timed" else None
    if policy["forecast"] in TRAINED and policy["planner"] in ("home", "timed") and policy["split"] == "quota":
        command = f"python -m runtime.infer --predictor {policies.predictor}"
        options = {"--devices": devices, "--redundant": redundant, "--max-moves": policies.max_moves}
        options |= {"--devices-per-node": policies.devices_per_node, "--groups": policies.num_groups}
        options |= {"--expert-overhead-tokens": price}
        return " ".join([command, *(f"{name} {value}" for name, value in options.items() if value is not None)])
    forecaster = "load_predictor(...)" if policy["forecast"] in TRAINED else repr(policy["forecast"])
    planner: dict[str, Any] = {"max_moves": policies.max_moves, "expert_overhead_tokens": price}
    moving, link = policy["planner"] == "moving", policies.between_nodes
    if policy["planner"] == "eplb":
        numbers = ", ".join(map(str, policies.groups)) if policies.num_groups else ""
        planner = {"planner": f"EplbPlanner({numbers})"}
    elif moving or (link != BETWEEN_NODES and policies.devices_per_node):
        known: dict[str, Any] = {"expert_overhead_tokens": price, "moving_homes": moving or None}
        known |= {"num_groups": policies.num_groups}
        known |= {"between_nodes": None if link == BETWEEN_NODES else float(f"{link:.4g}")}
        limits = f"{policies.max_moves}, {policies.devices_per_node}{_written(known)}"
        planner = {"planner": f"HomePlanner({devices}, {redundant}, {limits})"}
        planner |= {"expert_overhead_tokens": price}
    more = _written(planner | {"devices_per_node": policies.devices_per_node, "num_groups": policies.num_groups})
    split = "split_by_quota" if policy["split"] == "quota" else "split_evenly"
    return f"Balancer({devices}, {redundant}, {forecaster}{more}) with {split}"


def _written(arguments: dict[str, Any]) -> str:
    """Keyword arguments as Python, each after a comma; without the ones that are None."""
    return "".join(f", {name}={value}" for name, value in arguments.items() if value is not None)


def _save_plans(outcomes: list[Outcome], layers: IntArray, path: Path) -> None:
    """Stores plans, homes and device loads of each result as `<forecast>.<planner>.<split>.<array>`, and `layers`."""
    arrays: dict[str, npt.NDArray[Any]] = {"layers": layers}
    for item in outcomes:
        assert item.phy2log is not None
        assert item.device_load is not None
        name = f"{item.forecast}.{item.planner}.{item.split}"
        arrays[f"{name}.phy2log"] = item.phy2log.astype(np.int16)
        arrays[f"{name}.device_load"] = item.device_load
        if item.home_slots is not None:
            arrays[f"{name}.home_slots"] = item.home_slots.astype(np.int32)
    with whole_file(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
