"""Results of a sweep: a table, and a picture of the expert time saved by every recording and setting."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from data.style import GREY, HOT, INK, OURS, SMALL, drawing, heading, panels, save

MARKS = {"enable": "enable", "not worth it": "no", "not enough data": "?"}
CELL = (1.0, 0.3)
"""Width and height of a cell of the picture, inches."""
MOST_ROWS = 60
"""Rows of the picture from which on they are drawn thinner, without numbers."""


def sweep_table(report: dict[str, Any]) -> Table:
    """One row for each job: verdict, policy, expert time saved, milliseconds, and what a plan saves that is kept."""
    made = Table(
        title=_title(report), caption="\n".join(_notes(report)), caption_justify="left", box=SIMPLE, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    made.add_column("recording", overflow="fold", min_width=12)
    for name in report["varied"]:
        made.add_column(name.replace("_", " "), justify="right", min_width=9 if name == "gpu" else 5)
    for name in ("verdict", "policy"):
        made.add_column(name, no_wrap=True)
    for name in ("% saved (90 %)", "ms a layer", "kept plan, %"):
        made.add_column(name, justify="right", no_wrap=True)
    for name, rows in groupby(report["rows"], key=lambda row: row["loads"]):
        shown = Path(name).name
        for row in rows:
            if "refused" not in row:
                made.add_row(shown, *(_value(row[key]) for key in report["varied"]), *_cells(row))
                shown = ""
    return made


def _title(report: dict[str, Any]) -> str:
    """How many jobs, and the settings and the hardware that all of them share."""
    first = report["rows"][0]
    shared = {"devices": "devices", "redundant": "redundant experts a layer"}
    facts = [f"{first[name]} {called}" for name, called in shared.items() if name not in report["varied"]]
    hardware = next((row["hardware"] for row in report["rows"] if row.get("hardware")), None)
    if hardware and "gpu" in hardware:
        facts.append(
            f"experts of {hardware['model']}" + ("" if "gpu" in report["varied"] else f" on {hardware['gpu']}")
        )
    elif hardware:
        facts.append("speeds of this machine or as given")
    earlier = f" ({report['resumed']} from an earlier run)" if report["resumed"] else ""
    return ", ".join([f"{report['jobs']} jobs{earlier}", *facts])


def _notes(report: dict[str, Any]) -> list[str]:
    """What the columns mean, and why jobs were refused, or not enabled though time is saved."""
    notes, reasons = (
        ["kept plan: few moves, even split, made from the first quarter of the steps, judged on the rest"],
        dict[str, list[str]](),
    )
    for row in report["rows"]:
        if "refused" in row:
            reasons.setdefault(f"refused: {row['refused']}", []).append(_place(row, report["varied"]))
        elif "; but " in row["why"]:
            reason = f"{row['answer']}: {row['why'].partition('; but ')[2]}"
            reasons.setdefault(reason, []).append(_place(row, report["varied"]))
    for reason, places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        notes.append(f"{reason} ({places[0]}{more})")
    return notes


def _cells(row: dict[str, Any]) -> list[str]:
    if row["policy"] is None:
        return [row["answer"], *[""] * 4]
    saved, (low, high) = 100 * row["net_gain"], (100 * end for end in row["interval"])
    milliseconds, kept = row["layer_ms"], row["kept_plan"]
    return [
        row["answer"], ".".join(row["policy"].values()), f"{saved:.1f} ({low:.0f} to {high:.0f})",
        f"{milliseconds['without']:.3g} -> {milliseconds['with']:.3g}",
        f"{100 * kept['net_gain']:.1f}" if kept else "",
    ]  # fmt: skip


def _value(value: Any) -> str:
    return "no limit" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _place(row: dict[str, Any], names: list[str]) -> str:
    return ", ".join([Path(row["loads"]).name, *(f"{name} {_value(row[name])}" for name in names)])


@drawing()
def plot(report: dict[str, Any], path: Path) -> None:
    """Share of expert time saved, by recording and combination of settings; of the two, more go down than across.

    Args:
        report: The JSON document.
        path: The PNG to write.
    """
    from matplotlib.colors import LinearSegmentedColormap

    recordings = list(dict.fromkeys(row["loads"] for row in report["rows"]))
    settings = list(dict.fromkeys(_setting(row, report["varied"]) for row in report["rows"]))
    saved, marks = np.full((len(recordings), len(settings)), np.nan), {}
    for row in report["rows"]:
        place = recordings.index(row["loads"]), settings.index(_setting(row, report["varied"]))
        if row.get("net_gain") is None:
            marks[place] = "-"
        else:
            saved[place] = row["net_gain"]
            marks[place] = f"{row['net_gain']:.0%}  {MARKS[row['answer']]}"
    names, tried = [Path(name).name for name in recordings], [", ".join(setting) for setting in settings]
    if turned := len(settings) > len(recordings):
        saved, marks = saved.T, {(x, y): text for (y, x), text in marks.items()}
    across, down = (names, tried) if turned else (tried, names)
    width, height = CELL[0], CELL[1] if len(down) <= MOST_ROWS else CELL[1] / 3
    figure, axes = panels(max(6.5, 2.6 + width * len(across)), max(2.2, 1.5 + height * len(down)))
    axis = axes[0, 0]
    scale = LinearSegmentedColormap.from_list("saved", [HOT, "white", OURS])
    axis.imshow(np.nan_to_num(saved), cmap=scale, vmin=-1, vmax=1, aspect="auto")
    if len(down) <= MOST_ROWS:
        for (y, x), text in marks.items():
            dark = abs(saved[y, x]) > 0.6
            axis.text(x, y, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else INK)
    _label(axis, across, down)
    varied = ", ".join(name.replace("_", " ") for name in report["varied"])
    axis.set(**{"ylabel" if turned else "xlabel": varied})
    note = (
        "of the time without replicas, all costs counted, a plan before every step; darker blue: more saved, orange: "
    )
    note += "lost\nno: not worth it, ?: not enough data, -: refused, or no policy"
    heading(figure, "Expert time saved by the best policy", f"{_title(report)}\n{note}")
    save(figure, path)


def _label(axis: Any, across: list[str], down: list[str]) -> None:
    axis.set_yticks(range(len(down)), down)
    axis.set_xticks(range(len(across)), across, rotation=30 if max(map(len, across)) > 16 else 0)
    axis.set_xticks(np.arange(len(across) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(down) + 1) - 0.5, minor=True)
    axis.grid(visible=False)
    axis.grid(which="minor", color=GREY, linewidth=0.4)
    axis.tick_params(which="both", length=0)


def _setting(row: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    return tuple(_value(row[name]) for name in names)
