"""Outcomes as people read them: figures for the JSON document, the verdict in a frame, tables."""

from typing import Any

import numpy as np
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from data.shell import typed
from data.style import human
from runtime.simulate.forecasters import TRUTHS
from runtime.simulate.outcome import Outcome

LEAST_GAP = 0.01
"""Balancedness that the oracle gains over the last batch from which a share of that gain means something."""
OTHERS = ("vllm", "tensorrt-llm", "vllm-ascend")
"""Engines beside SGLang that `switchcast export` writes plans for."""
EXPLAINED = {
    "last": "the last batch's load", "mean": "mean of all batches so far", "ema": "exponential moving average",
    "own": "each request's past, shrunk to the average",
    "learned": "the predictor", "adaptive": "the predictor, corrected by what was observed",
    "oracle": "the true load", "exact": "the true load, moves planned by their price",
    "eplb": "re-solves the placement from scratch", "home": "keeps every expert at home, moves replicas only",
    "moving": "as home, but homes move too",
    "timed": "as home, but planner and quota count the time of an expert's weights",
}  # fmt: skip


def document(outcomes: list[Outcome], expert_bytes: float) -> dict[str, Any]:
    """The figures of each replay, as they stand in the JSON document."""
    results = [_figures(item, expert_bytes) for item in outcomes]
    for result in results:
        result["gap_closed"] = _gap_closed(result, results)
    return {"steps": outcomes[0].num_steps if outcomes else 0, "results": results}


def _figures(item: Outcome, expert_bytes: float) -> dict[str, Any]:
    mean, largest = item.mean_load.sum(), item.largest_load.sum()
    return {
        "forecast": item.forecast,
        "planner": item.planner,
        "split": item.split,
        "load_tv": None if item.load_tv is None else round(item.load_tv, 5),
        "balancedness": round(item.mean_balancedness, 5),
        "p05": round(item.p05, 5),
        "ratio_of_sums": round(float(mean / largest) if largest else 1.0, 5),
        "moves_per_layer": round(item.moves_per_layer, 4),
        "bytes_per_step": round(float(item.arrivals.mean() * expert_bytes)),
        "plan_ms": round(float(np.median(item.plan_ms)), 4),
        "split_us": round(float(np.median(item.split_us)), 2),
    }


def _gap_closed(result: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """How far the policy's forecast gets from the last batch towards the oracle.

    None where either was not replayed, or where the oracle gains less than `LEAST_GAP`.
    """
    of = {
        other["forecast"]: other["balancedness"]
        for other in results
        if (other["planner"], other["split"]) == (result["planner"], result["split"])
    }
    if not {"last", "oracle"} <= of.keys() or of["oracle"] - of["last"] < LEAST_GAP:
        return None
    closed: float = (result["balancedness"] - of["last"]) / (of["oracle"] - of["last"])
    return round(closed, 4)


def policy_of(result: dict[str, Any]) -> tuple[str, str, str]:
    """Names of the forecast, planner and split."""
    return result["forecast"], result["planner"], result["split"]


def judged_policy(report: dict[str, Any]) -> tuple[str, str, str] | None:
    """The policy that the verdict is about; without one, that of highest balancedness, and of equals of least moves."""
    if policy := report["verdict"].get("policy"):
        return policy_of(policy)
    honest = [result for result in report["results"] if result["forecast"] not in TRUTHS]
    best = max(honest, key=lambda result: (result["balancedness"], -result["moves_per_layer"]), default=None)
    return None if best is None else policy_of(best)


def verdict_panel(report: dict[str, Any]) -> Panel:
    """The verdict in a frame: the answer, its reason, the policy, what it was compared with, and what it assumes."""
    answer = report["verdict"]
    lines = [f"{answer['why']}."]
    if "policy" in answer:
        layer, step, host = answer["layer_ms"], answer["step_ms"], answer["host_ms"]
        rival, traffic = answer["baselines"]["no predictor"], answer["traffic"]
        both, steps = (f"{_number(item['without'])} -> {_number(item['with'])} ms" for item in (layer, step))
        lines.append(
            f"Without replicas and with, all costs counted: [bold]{both} a layer[/bold], {steps} a step of "
            f"{report['layers']} layers"
        )
        lines.append(f"Best policy, with a plan before every step: {_policy(answer['policy'])}")
        if rival and _policy(rival) != _policy(answer["policy"]):
            lines.append(f"Without a predictor: {_policy(rival)}, {_number(rival['step_ms'])} ms a step")
        prepare, split, exposed = (_number(host[name]) for name in ("prepare", "split", "exposed"))
        lines.append(
            f"This machine: {prepare} ms a step to forecast and plan, {split} ms to split; {exposed} ms of it delay "
            f"the step (without: {host['net_gain_without']:.1%} saved)"
        )
        lines.append(_memory_line(answer["memory"]))
        size, recorded = traffic["tokens_per_step"], traffic["recorded_tokens_per_step"]
        scaled = f", scaled from {_number(recorded)} to {_number(size)} tokens a step" if recorded != size else ""
        lines.append(f"Traffic: {_number(traffic['tokens_per_expert'])} tokens an expert and step{scaled}")
        lines.append(f"Hardware: {hardware_line(answer['hardware'])}")
        lines += [f"In a loop of your own: {typed(answer['switch_on'])}"] * (answer["answer"] != "not worth it")
    colour = {"enable": "green", "not worth it": "yellow"}.get(answer["answer"], "white")
    return Panel("\n".join(lines), title=f"Verdict: [bold]{answer['answer']}[/bold]", border_style=colour)


def engines_table(report: dict[str, Any]) -> Table:
    """What plans that are kept save, in engines that split evenly, and the command that writes one."""
    engines = report["engines"]
    about = (
        f"A plan is made from the first {engines['made_from']} steps, and judged on the {engines['judged_on']} after."
    )
    if any(plan["way"] == "renewed" for plan in engines["plans"]):
        about += f" Renewed: every {engines['renew_every']} steps, moves and planning in full."
    if engines["export"] and any(plan["answer"] != "not worth it" for plan in engines["plans"]):
        about += f"\nWrite it (or for {', '.join(OTHERS)}):\n{escape(typed(engines['export']))}"
        if "--model" in engines["export"]:
            about += "\nFOLDER is the model's; name the layers too if only some were recorded: --layers 0,6,12"
    made = Table(
        title="In SGLang, vLLM, TensorRT-LLM and vllm-ascend: even split, plans that are kept",
        caption=about, caption_justify="left",
    )  # fmt: skip
    for name in ("plan", "verdict"):
        made.add_column(name)
    for name in ("time saved", "90 % interval", "ms a layer", "balancedness", "moves a layer"):
        made.add_column(name, justify="right")
    for plan in engines["plans"]:
        low, high = plan["interval"]
        without, kept = (_number(plan["layer_ms"][name]) for name in ("without", "with"))
        made.add_row(
            f"{plan['way']}, {human(plan['planner'])}", plan["answer"], f"{plan['net_gain']:.1%}",
            f"{low:.1%} to {high:.1%}", f"{without} -> {kept}", f"{plan['balancedness']:.3f}",
            f"{plan['moves_per_layer']:.2f}",
        )  # fmt: skip
    return made


def _number(value: float) -> str:
    """Four digits, and all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _memory_line(memory: dict[str, Any]) -> str:
    layers, recorded = memory["layers"], memory["recorded_layers"]
    which = f"all {layers} layers of the model, of which {recorded} were recorded" if layers > recorded else (
        f"the {layers} layers that were recorded"
    )  # fmt: skip
    return (
        f"Memory of the replicas: {memory['bytes_per_device'] / 1e9:.3g} GB a device in {which}, "
        f"{memory['share_of_experts']:.0%} of the experts"
    )


def hardware_line(hardware: dict[str, Any]) -> str:
    """The hardware assumed, and how sure its times are, in one line."""
    if "gpu" not in hardware:
        speeds = f"{hardware['tokens_per_second']:.3g} tokens/s, {hardware['bytes_per_second'] / 1e9:.3g} GB/s"
        if "node_bytes_per_second" in hardware:
            speeds += f" ({hardware['node_bytes_per_second'] / 1e9:.3g} between nodes)"
        expert, tokens = hardware["expert_bytes"] / 1e6, hardware["expert_overhead_tokens"]
        return f"{speeds}, the {expert:.3g} MB of an expert read in the time of {tokens:.3g} tokens"
    called = {"tokens": "between token counts", "ep_size": "between EP sizes", "skew": "on skewed loads",
              "shape": "from another shape"}  # fmt: skip
    errors = [f"{item['median']:.1%} {called[name]} ({item['p90']:.0%})" for name, item in hardware["error"].items()]
    estimate = f"an estimate {hardware['estimate']}" if hardware["estimate"] else "measured"
    experts = f"{hardware['num_experts']} experts of {hardware['model']} in {hardware['precision']}"
    if hardware["model_experts"] != hardware["num_experts"]:
        experts += f" (sizes alone: that model has {hardware['model_experts']} experts a layer)"
    exchange = f"{hardware['dispatch']} dispatch, {hardware['links']}"
    return (
        f"{hardware['gpu']}, {experts}, {estimate} with {hardware['kernel']}; {exchange}; error, median (90th "
        f"percentile): {', '.join(errors)}"
    )


def _policy(policy: dict[str, Any]) -> str:
    names = ("forecast", "planner", "split")
    return ", ".join(f"{name} [bold]{policy[name]}[/bold]" for name in names)


def table(report: dict[str, Any], details: bool = False) -> Table:
    """The figures as a table, the verdict's policy in bold, or else the best that does not know the future.

    Args:
        report: The JSON document.
        details: Whether to show every figure.
    """
    names = list(dict.fromkeys(result[key] for key in ("forecast", "planner") for result in report["results"]))
    notes = _left_out(report) + _uneven(report)
    notes += [f"{name}: {EXPLAINED[name]}" for name in names if name in EXPLAINED]
    made = Table(
        title=f"{report['loads']}: {report['steps']} steps of {report['layers']} layers, {report['devices']} devices, "
        f"{report['redundant']} redundant experts a layer",
        caption="\n".join(notes),
        caption_justify="left",
    )
    for name in ("forecast", "planner", "split"):
        made.add_column(name)
    columns = ["load error", "balancedness", "5th percentile", "moves a layer", "plan ms"]
    nodes = ["moves in a node", "tokens in a node"] if report.get("devices_per_node") else []
    for name in columns + nodes + (["ratio of sums", "MB a step", "split µs", "gap closed"] if details else []):
        made.add_column(name, justify="right")
    best = judged_policy(report)
    for result in report["results"]:
        closed = result["gap_closed"]
        error = result.get("load_tv")
        cells = [result["forecast"], result["planner"], result["split"], "" if error is None else f"{error:.3f}"]
        cells += [f"{result['balancedness']:.3f}", f"{result['p05']:.3f}"]
        cells += [f"{result['moves_per_layer']:.2f}", f"{result['plan_ms']:.2f}"]
        if nodes:
            cells += ["" if result[name] is None else f"{result[name]:.1%}" for name in ("near_moves", "near_tokens")]
        if details:
            cells += [f"{result['ratio_of_sums']:.3f}", f"{result['bytes_per_step'] / 1e6:.1f}"]
            cells += [f"{result['split_us']:.1f}", "" if closed is None else f"{closed:.0%}"]
        made.add_row(*cells, style="bold" if policy_of(result) == best else None)
    return made


def _uneven(report: dict[str, Any]) -> list[str]:
    """A line about the placement without replicas, where it cannot give all devices as many experts."""
    experts, devices = report["experts"], report["devices"]
    each = experts // devices
    without = f"without replicas, {experts % devices} of {devices} devices have {each + 1} of {experts} experts"
    return [f"contiguous: {without}, the others {each}"] * (experts % devices > 0)


def _left_out(report: dict[str, Any]) -> list[str]:
    """A line that says what is in no figure, if anything."""
    steps, layers = report["left_out"]["steps"], len(report["left_out"]["layers"])
    found = [f"{steps} steps"] * bool(steps) + [f"{layers} of {layers + report['layers']} layers"] * bool(layers)
    return [f"left out, because they hold no tokens: {' and '.join(found)}"] if found else []
