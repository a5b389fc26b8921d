"""Outcomes as people read them: figures for the JSON document, the verdict in a frame, a table, a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.table import Table

from data.arrays import FloatArray
from data.style import (
    GREY,
    INK,
    LIGHT,
    LINES,
    ORACLE,
    OURS,
    OURS_PALE,
    SMALL,
    canvas,
    drawing,
    end_labels,
    heading,
    human,
    save,
)
from runtime.simulate.forecasters import TRUTHS
from runtime.simulate.outcome import Outcome

DRAWN = {
    ("none", "contiguous", "even"),
    ("last", "eplb", "even"),
    ("last", "home", "quota"),
    ("learned", "home", "quota"),
    ("adaptive", "home", "quota"),
    ("oracle", "home", "quota"),
}
"""Policies whose balancedness is drawn step after step."""
LEAST_GAP = 0.01
"""Balancedness that the oracle gains over the last batch from which a share of that gain means something."""
EXPLAINED = {
    "last": "the last batch's load", "mean": "mean of all batches so far", "ema": "exponential moving average",
    "own": "each request's past, shrunk to the average",
    "learned": "the predictor", "adaptive": "the predictor, corrected by what was observed",
    "oracle": "the true load", "exact": "the true load, moves planned by their price",
    "eplb": "re-solves the placement from scratch", "home": "keeps every expert at home, moves replicas only",
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


def best_honest(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The result of highest balancedness among policies that do not know the future; of equals, that of least moves."""
    honest = [result for result in results if result["forecast"] not in TRUTHS]
    return max(honest, key=lambda result: (result["balancedness"], -result["moves_per_layer"]), default=None)


def verdict_panel(report: dict[str, Any]) -> Panel:
    """The verdict in a frame: the answer, its reason, the policy, what it was compared with, and what it assumes."""
    answer = report["verdict"]
    lines = [f"{answer['why']}."]
    if "policy" in answer:
        layer, step, memory = answer["layer_ms"], answer["step_ms"], answer["memory"]
        rival, traffic = answer["baselines"]["no predictor"], answer["traffic"]
        lines.append(
            f"Without replicas and with, all costs counted: [bold]{layer['without']:.4g} -> {layer['with']:.4g} ms a "
            f"layer[/bold], {step['without']:.4g} -> {step['with']:.4g} ms a step of {report['layers']} layers"
        )
        lines.append(f"Best policy: {_policy(answer['policy'])}")
        if rival and _policy(rival) != _policy(answer["policy"]):
            lines.append(f"Without a predictor: {_policy(rival)}, {rival['step_ms']:.4g} ms a step")
        lines.append(
            f"Memory of the replicas: {memory['bytes_per_device'] / 1e9:.3g} GB a device in {memory['layers']} layers, "
            f"{memory['share_of_experts']:.0%} of the experts"
        )
        size, recorded = traffic["tokens_per_step"], traffic["recorded_tokens_per_step"]
        scaled = f", scaled from {recorded:.4g} to {size:.4g} tokens a step" if recorded != size else ""
        lines.append(f"Traffic: {traffic['tokens_per_expert']:.4g} tokens an expert and step{scaled}")
        lines.append(f"Hardware: {hardware_line(answer['hardware'])}")
        lines += [f"Switch it on: {answer['switch_on']}"] * (answer["answer"] != "not worth it")
    colour = {"enable": "green", "not worth it": "yellow"}.get(answer["answer"], "white")
    return Panel("\n".join(lines), title=f"Verdict: [bold]{answer['answer']}[/bold]", border_style=colour)


def hardware_line(hardware: dict[str, Any]) -> str:
    """The hardware assumed, and how sure its times are, in one line."""
    if "gpu" not in hardware:
        speeds = f"{hardware['tokens_per_second']:.3g} tokens/s, {hardware['bytes_per_second'] / 1e9:.3g} GB/s"
        expert, tokens = hardware["expert_bytes"] / 1e6, hardware["expert_overhead_tokens"]
        return f"{speeds}, the {expert:.3g} MB of an expert read in the time of {tokens:.3g} tokens"
    called = {"tokens": "between token counts", "ep_size": "between EP sizes", "skew": "on skewed loads",
              "shape": "from another shape"}  # fmt: skip
    errors = [f"{item['median']:.1%} {called[name]} ({item['p90']:.0%})" for name, item in hardware["error"].items()]
    estimate = f"an estimate {hardware['estimate']}" if hardware["estimate"] else "measured"
    experts = f"{hardware['num_experts']} experts of {hardware['model']} in {hardware['precision']}"
    exchange = f"{hardware['dispatch']} dispatch, {hardware['links']}"
    return (
        f"{hardware['gpu']}, {experts}, {estimate} with {hardware['kernel']}; {exchange}; error, median (90th "
        f"percentile): {', '.join(errors)}"
    )


def _policy(policy: dict[str, Any]) -> str:
    names = ("forecast", "planner", "split")
    return ", ".join(f"{name} [bold]{policy[name]}[/bold]" for name in names)


def table(report: dict[str, Any], details: bool = False) -> Table:
    """The figures as a table, the best policy that does not know the future in bold.

    Args:
        report: The JSON document.
        details: Whether to show every figure.
    """
    names = list(dict.fromkeys(result[key] for key in ("forecast", "planner") for result in report["results"]))
    made = Table(
        title=f"{report['loads']}: {report['steps']} steps of {report['layers']} layers, {report['devices']} devices, "
        f"{report['redundant']} redundant experts a layer",
        caption="\n".join([*_left_out(report), *(f"{name}: {EXPLAINED[name]}" for name in names if name in EXPLAINED)]),
        caption_justify="left",
    )
    for name in ("forecast", "planner", "split"):
        made.add_column(name)
    columns = ["load error", "balancedness", "5th percentile", "moves a layer", "plan ms"]
    for name in columns + (["ratio of sums", "MB a step", "split µs", "gap closed"] if details else []):
        made.add_column(name, justify="right")
    best = best_honest(report["results"])
    for result in report["results"]:
        closed = result["gap_closed"]
        error = result.get("load_tv")
        cells = [result["forecast"], result["planner"], result["split"], "" if error is None else f"{error:.3f}"]
        cells += [f"{result['balancedness']:.3f}", f"{result['p05']:.3f}"]
        cells += [f"{result['moves_per_layer']:.2f}", f"{result['plan_ms']:.2f}"]
        if details:
            cells += [f"{result['ratio_of_sums']:.3f}", f"{result['bytes_per_step'] / 1e6:.1f}"]
            cells += [f"{result['split_us']:.1f}", "" if closed is None else f"{closed:.0%}"]
        made.add_row(*cells, style="bold" if result is best else None)
    return made


def _left_out(report: dict[str, Any]) -> list[str]:
    """A line that says what is in no figure, if anything."""
    steps, layers = report["left_out"]["steps"], len(report["left_out"]["layers"])
    found = [f"{steps} steps"] * bool(steps) + [f"{layers} of {layers + report['layers']} layers"] * bool(layers)
    return [f"left out, because they hold no tokens: {' and '.join(found)}"] if found else []


@drawing()
def plot(outcomes: list[Outcome], start: int, path: Path) -> None:
    """Balancedness of each policy: its mean, and for a few step after step, with the moves they make below.

    Args:
        outcomes: Outcomes of the policies.
        start: Number of the first step.
        path: The PNG to write.
    """
    best = _best(outcomes)
    rows = list(dict.fromkeys((item.forecast, item.planner) for item in outcomes))
    figure = canvas(10.5, max(1.3 + 0.24 * len(rows), 4))
    mosaic: Any = [["means", "steps"], ["means", "moves"]]
    axes = figure.subplot_mosaic(mosaic, width_ratios=[4, 5], height_ratios=[3, 1])
    _draw_means(axes["means"], outcomes, rows, best)
    width = max(1, outcomes[0].num_steps // 60) if outcomes else 1
    _draw_steps(axes["steps"], axes["moves"], outcomes, best, start, width)
    note = "mean device load / largest, 1 is perfect; filled: split by quota, hollow: split evenly"
    note += f"; right: means over layers and {width} steps" if width > 1 else "; right: means over layers"
    heading(figure, "Balancedness of each policy, and the moves it costs", note)
    save(figure, path)


def _name(item: Outcome) -> tuple[str, str, str]:
    return item.forecast, item.planner, item.split


def _best(outcomes: list[Outcome]) -> tuple[str, str, str]:
    """The policy of highest balancedness among those that do not know the future."""
    honest = [item for item in outcomes if item.forecast not in TRUTHS] or outcomes
    return max(((item.mean_balancedness, _name(item)) for item in honest), default=(0, ("", "", "")))[1]


def _colour(forecast: str, planner: str, best: tuple[str, str, str]) -> str:
    if planner != "home":
        return LIGHT if planner == "contiguous" else GREY
    if forecast in TRUTHS:
        return ORACLE
    return OURS if (forecast, planner) == best[:2] else OURS_PALE


def _draw_means(axes: Any, outcomes: list[Outcome], rows: list[tuple[str, str]], best: tuple[str, str, str]) -> None:
    """Two marks a row, filled for quotas and hollow for even splits; the best policy's number in bold."""
    means = {_name(item): item.mean_balancedness for item in outcomes}
    for place, row in enumerate(rows):
        found = {split: means[*row, split] for split in ("even", "quota") if (*row, split) in means}
        colour = _colour(*row, best)
        axes.plot(list(found.values()), [place] * len(found), color=colour, linewidth=1.2, zorder=2)
        for split, mean in found.items():
            fill = "white" if split == "even" else colour
            axes.plot([mean], [place], "o", color=colour, markerfacecolor=fill, markersize=6, zorder=3)
        bold = row == best[:2]
        axes.text(
            1.02, place, f"{max(found.values()):.3f}", transform=axes.get_yaxis_transform(), va="center",
            fontsize=SMALL, fontweight="bold" if bold else "normal", color=OURS if bold else INK,
        )  # fmt: skip
    labels = []
    for place, (forecast, planner) in enumerate(rows):
        again = place and rows[place - 1][0] == forecast
        labels.append(human(planner) if again or planner == "contiguous" else f"{human(forecast)}:  {human(planner)}")
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(min([0.5, *(mean - 0.02 for mean in means.values())]), 1.01), ylim=(len(rows) - 0.4, -0.6))
    axes.set(xlabel="balancedness, mean over steps and layers")


def _draw_steps(
    balance: Any, moves: Any, outcomes: list[Outcome], best: tuple[str, str, str], start: int, width: int
) -> None:
    """Balancedness step after step, and below it the experts that each policy moves."""
    shown = [item for item in outcomes if _name(item) in DRAWN | {best}]
    ends, moved = [], []
    for item in shown:
        colour = _colour(item.forecast, item.planner, best)
        style = LINES["oracle"] if colour == ORACLE else {"color": colour, "linewidth": 2.4 if colour == OURS else 1.1}
        values = _smooth(item.balance, width)
        steps = np.arange(start + width - 1, start + width - 1 + len(values))
        balance.plot(steps, values, **style)
        policy = human(item.planner)
        if item.planner != "contiguous":
            policy = f"{human(item.forecast)}, {policy}{', even split' if item.split == 'even' else ''}"
        ends.append((float(values[-1]), policy, GREY if colour == LIGHT else colour))
        if item.planner != "contiguous" and item.forecast not in TRUTHS:
            moves.plot(steps, _smooth(item.arrivals / item.shape[0], width), **style)
            short = human(item.planner if item.planner == "eplb" else item.forecast)
            moved.append((item.moves_per_layer, f"{item.moves_per_layer:.1f} {short}", colour))
    balance.set(ylabel="balancedness", ylim=(min([0.4, *(end[0] - 0.05 for end in ends)]), 1.02))
    balance.tick_params(labelbottom=False)
    moves.set_yscale("symlog", linthresh=1)
    moves.set(xlabel="step", ylabel="moves\na layer", ylim=(0, 2 * max([1.0, *(end[0] for end in moved)])))
    if shown:
        last = start + shown[0].num_steps - 1
        for axes in (balance, moves):
            axes.set_xlim(start, max(last, start + 1))
        end_labels(balance, ends)
        end_labels(moves, moved, gap=0.24)


def _smooth(values: FloatArray, width: int) -> FloatArray:
    """Moving average over `width` steps; shorter by `width - 1`."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return np.asarray((sums[width:] - sums[:-width]) / width)
