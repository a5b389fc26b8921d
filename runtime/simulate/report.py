"""Results of replays for people and programs: figures, a table, a plot."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from runtime.simulate.replay import Replay

LINES = {
    ("contiguous", "even", "none"),
    ("eplb", "even", "last"),
    ("home", "quota", "last"),
    ("home", "quota", "learned"),
    ("home", "quota", "oracle"),
}
"""Policies whose balancedness is drawn step after step."""


def document(replays: list[Replay], expert_bytes: float) -> dict[str, Any]:
    """The figures of each replay, as they stand in the JSON document."""
    results = [_figures(item, expert_bytes) for item in replays]
    for result in results:
        result["gap_closed"] = _gap_closed(result, results)
    return {"steps": len(replays[0].plan_ms) if replays else 0, "results": results}


def _figures(item: Replay, expert_bytes: float) -> dict[str, Any]:
    balance = item.balancedness
    mean, largest = item.device_load.mean(-1).sum(), item.device_load.max(-1).sum()
    return {
        "forecast": item.forecast,
        "planner": item.planner,
        "split": item.split,
        "balancedness": round(float(balance.mean()), 5),
        "p05": round(float(np.quantile(balance, 0.05)), 5),
        "ratio_of_sums": round(float(mean / largest) if largest else 1.0, 5),
        "moves_per_layer": round(item.moves_per_layer, 4),
        "bytes_per_step": round(float(item.arrivals.sum(-1).mean() * expert_bytes)),
        "plan_ms": round(float(np.median(item.plan_ms)), 4),
        "split_us": round(float(np.median(item.split_us)), 2),
    }


def _gap_closed(result: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """How far the policy's forecast gets from the last batch towards the oracle; None where either was not replayed."""
    of = {
        other["forecast"]: other["balancedness"]
        for other in results
        if (other["planner"], other["split"]) == (result["planner"], result["split"])
    }
    if not {"last", "oracle"} <= of.keys() or of["oracle"] <= of["last"]:
        return None
    closed: float = (result["balancedness"] - of["last"]) / (of["oracle"] - of["last"])
    return round(closed, 4)


def table(report: dict[str, Any]) -> Table:
    """The figures as a table."""
    made = Table(
        title=f"{report['loads']}: {report['steps']} steps, {report['devices']} devices, "
        f"{report['redundant']} redundant experts a layer"
    )
    for name in ("forecast", "planner", "split"):
        made.add_column(name)
    for name in ("balancedness", "p05", "ratio of sums", "moves/layer", "MB/step", "plan ms", "split µs", "gap closed"):
        made.add_column(name, justify="right")
    for result in report["results"]:
        closed = result["gap_closed"]
        made.add_row(
            *(result[name] for name in ("forecast", "planner", "split")),
            *(f"{result[name]:.3f}" for name in ("balancedness", "p05", "ratio_of_sums")),
            f"{result['moves_per_layer']:.2f}",
            f"{result['bytes_per_step'] / 1e6:.1f}",
            f"{result['plan_ms']:.2f}",
            f"{result['split_us']:.1f}",
            "" if closed is None else f"{closed:.0%}",
        )
    return made


def plot(replays: list[Replay], start: int, path: Path) -> None:
    """Balancedness of each policy: its mean, and step after step for a few."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, lines) = pyplot.subplots(
        1, 2, figsize=(13, 1.6 + 0.28 * len(replays)), width_ratios=[2, 3], layout="constrained"
    )
    names = [f"{item.forecast} · {item.planner} · {item.split}" for item in replays]
    means = [float(item.balancedness.mean()) for item in replays]
    colours = {"contiguous": "tab:gray", "eplb": "tab:orange", "home": "tab:blue"}
    bars.barh(names, means, color=[colours[item.planner] for item in replays])
    for row, mean in enumerate(means):
        bars.text(mean, row, f" {mean:.3f}", va="center", fontsize=8)
    bars.invert_yaxis()
    bars.set(xlim=(0, 1.12), xlabel="balancedness, mean over steps and layers")
    width = max(1, len(replays[0].plan_ms) // 60) if replays else 1
    for item, name in zip(replays, names, strict=True):
        if (item.planner, item.split, item.forecast) in LINES:
            balance = np.convolve(item.balancedness.mean(-1), np.full(width, 1 / width), "valid")
            lines.plot(range(start + width - 1, start + width - 1 + len(balance)), balance, label=name, linewidth=1.2)
    lines.set(xlabel="step", ylabel=f"balancedness, mean over layers and {width} steps", ylim=(0, 1.02))
    if lines.lines:
        lines.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
