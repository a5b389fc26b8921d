"""Results of a sweep: a table, and a picture of the expert time saved by every recording and setting."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.style import GREY, INK, OURS, SMALL, drawing, heading, panels, save

MARKS = {"enable": "enable", "not worth it": "no", "not enough data": "?"}
MOST_CELLS = 24
"""Settings side by side from which on the picture carries colours without numbers."""


def sweep_table(report: dict[str, Any]) -> Table:
    """One row for each job: verdict, policy, expert time saved, balancedness, moves."""
    refused = [row for row in report["rows"] if "refused" in row]
    made = Table(
        title=f"{report['jobs']} jobs, {report['resumed']} of them from an earlier run" if report["resumed"]
        else f"{report['jobs']} jobs",
        caption="\n".join(f"refused: {_place(row, report['varied'])}: {row['refused']}" for row in refused) or None,
        caption_justify="left",
    )  # fmt: skip
    made.add_column("recording")
    for name in report["varied"]:
        made.add_column(name.replace("_", " "), justify="right")
    for name in ("verdict", "policy"):
        made.add_column(name)
    for name in ("time saved", "90 % interval", "balancedness", "moves a layer"):
        made.add_column(name, justify="right")
    for name, rows in groupby(report["rows"], key=lambda row: row["loads"]):
        shown = Path(name).name
        for row in rows:
            if "refused" not in row:
                made.add_row(shown, *(_value(row[key]) for key in report["varied"]), *_cells(row))
                shown = ""
    return made


def _cells(row: dict[str, Any]) -> list[str]:
    if row["policy"] is None:
        return [row["answer"], "", "", "", "", ""]
    low, high = row["interval"]
    without, best = (_figure(row["balancedness"][name]) for name in ("without", "with"))
    moves = row["moves_per_layer"]
    return [
        row["answer"], ", ".join(row["policy"].values()), f"{row['net_gain']:.1%}", f"{low:.1%} to {high:.1%}",
        f"{without} to {best}", "" if moves is None else f"{moves:.2f}",
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _value(value: Any) -> str:
    return "no limit" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _place(row: dict[str, Any], names: list[str]) -> str:
    return ", ".join([Path(row["loads"]).name, *(f"{name} {_value(row[name])}" for name in names)])


@drawing()
def plot(report: dict[str, Any], path: Path) -> None:
    """Share of expert time saved: a row for each recording, a column for each combination of settings.

    Args:
        report: The JSON document.
        path: The PNG to write.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows = list(dict.fromkeys(row["loads"] for row in report["rows"]))
    columns = list(dict.fromkeys(_setting(row, report["varied"]) for row in report["rows"]))
    saved, marks = np.full((len(rows), len(columns)), np.nan), {}
    for row in report["rows"]:
        place = rows.index(row["loads"]), columns.index(_setting(row, report["varied"]))
        if row.get("net_gain") is not None:
            saved[place] = row["net_gain"]
            marks[place] = f"{row['net_gain']:.0%}\n{MARKS[row['answer']]}"
        else:
            marks[place] = "-"
    figure, axes = panels(max(4.5, 2.2 + 0.75 * len(columns)), max(2.2, 1.5 + 0.42 * len(rows)))
    scale = LinearSegmentedColormap.from_list("saved", ["white", OURS])
    axis = axes[0, 0]
    axis.imshow(np.nan_to_num(saved), cmap=scale, vmin=0, vmax=1, aspect="auto")
    if len(columns) <= MOST_CELLS:
        for (y, x), text in marks.items():
            dark = saved[y, x] > 0.6
            axis.text(x, y, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else INK)
    axis.set_yticks(range(len(rows)), [Path(name).name for name in rows])
    axis.set_xticks(range(len(columns)), columns)
    axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axis.grid(visible=False)
    axis.grid(which="minor", color=GREY, linewidth=0.4)
    axis.tick_params(which="both", length=0)
    if report["varied"]:
        axis.set_xlabel(", ".join(name.replace("_", " ") for name in report["varied"]))
    note = "of the time without replicas, all costs counted; below it the verdict; -: refused, or no policy"
    heading(figure, "Expert time saved by the best policy", note)
    save(figure, path)


def _setting(row: dict[str, Any], names: list[str]) -> str:
    return "\n".join(_value(row[name]) for name in names)
