"""Picture of a simulation: balancedness of each policy, step after step too, and the moves it costs."""

from pathlib import Path
from typing import Any

import numpy as np

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
from runtime.simulate.report import judged_policy

DRAWN = {
    ("none", "contiguous", "even"),
    ("last", "eplb", "even"),
    ("last", "home", "quota"),
    ("learned", "home", "quota"),
    ("adaptive", "home", "quota"),
    ("oracle", "home", "quota"),
}
"""Policies whose balancedness is drawn step after step."""


@drawing()
def plot(outcomes: list[Outcome], report: dict[str, Any], start: int, path: Path) -> None:
    """Balancedness of each policy: its mean, and for a few step after step, with the moves they make below.

    Args:
        outcomes: Outcomes of the policies.
        report: The JSON document, whose verdict's policy stands out.
        start: Number of the first step.
        path: The PNG to write.
    """
    best = judged_policy(report) or ("", "", "")
    rows = list(dict.fromkeys((item.forecast, item.planner) for item in outcomes))
    figure = canvas(10.5, max(1.3 + 0.24 * len(rows), 4))
    mosaic: Any = [["means", "steps"], ["means", "moves"]]
    axes = figure.subplot_mosaic(mosaic, width_ratios=[4, 5], height_ratios=[3, 1])
    _draw_means(axes["means"], outcomes, rows, best)
    width = max(1, outcomes[0].num_steps // 60) if outcomes else 1
    _draw_steps(axes["steps"], axes["moves"], outcomes, best, start, width)
    note = "mean device load / largest, 1 is perfect; filled: split by quota, hollow: split evenly"
    note += f"; right: means over layers and {width} steps" if width > 1 else "; right: means over layers"
    gpu = report["verdict"].get("hardware", {}).get("gpu")
    where = f"{Path(report['loads']).name}, {report['devices']} devices, {report['redundant']} redundant experts"
    where += f", times of {gpu}" if gpu else ""
    note = f"{where}; bold: the verdict's policy\n{note}"
    heading(figure, "Balancedness of each policy, and the moves it costs", note)
    save(figure, path)


def _name(item: Outcome) -> tuple[str, str, str]:
    return item.forecast, item.planner, item.split


def _colour(forecast: str, planner: str, best: tuple[str, str, str]) -> str:
    if planner not in ("home", "moving", "timed") and (forecast, planner) != best[:2]:
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
        number = means.get(best, 0.0) if bold else max(found.values())
        axes.text(
            1.02, place, f"{number:.3f}", transform=axes.get_yaxis_transform(), va="center",
            fontsize=SMALL, fontweight="bold" if bold else "normal", color=OURS if bold else INK,
        )  # fmt: skip
    labels = []
    for place, (forecast, planner) in enumerate(rows):
        again = place and rows[place - 1][0] == forecast
        labels.append(human(planner) if again or planner == "contiguous" else f"{forecast}:  {human(planner)}")
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
    ends, moved, lowest = [], [], 0.9
    for item in shown:
        colour = _colour(item.forecast, item.planner, best)
        if colour == OURS and _name(item) != best:
            colour = OURS_PALE
        style = LINES["oracle"] if colour == ORACLE else {"color": colour, "linewidth": 2.4 if colour == OURS else 1.1}
        values = _smooth(item.balance, width)
        steps = np.arange(start + width - 1, start + width - 1 + len(values))
        balance.plot(steps, values, **style)
        lowest = min(lowest, float(values.min()))
        policy = human(item.planner)
        if item.planner != "contiguous":
            policy = f"{item.forecast}, {policy}{', even split' if item.split == 'even' else ''}"
        ends.append((float(values[-1]), policy, GREY if colour == LIGHT else colour))
        if item.planner != "contiguous" and item.forecast not in TRUTHS:
            moves.plot(steps, _smooth(item.arrivals / item.shape[0], width), **style)
            short = human(item.planner) if item.planner == "eplb" else item.forecast
            moved.append((item.moves_per_layer, f"{item.moves_per_layer:.1f} {short}", colour))
    balance.set(ylabel="balancedness", ylim=(lowest - 0.03, 1.02))
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
