"""Colours, names and shapes that all pictures of the project share.

A colour means the same in every picture: ours is blue and thick, rivals are grey, the oracle is green and dashed,
running without replicas is light grey; pale blue is our planner fed by a rival's forecast. Lines carry their names at
their ends in place of a legend.

    with drawing():
        figure, axes = panels(8.3, 3)
        axes[0, 0].plot(values, **line("learned"))
    save(figure, path)

Importing this module does not load matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
GREY = "#8b949e"
LIGHT = "#d0d7de"
OURS = "#1f6feb"
OURS_PALE = "#8ab4f8"
ORACLE = "#2da44e"
BAD = "#cf222e"
HOT = "#e8590c"

DPI = 140
SMALL = 8
"""Size in points of labels inside a picture; other text has 9 points."""
GAP = 0.07
"""Least distance between two labels at line ends, in axes heights."""

NAMES = {
    "steady": "steady mix", "drift": "slow drift", "every_10": "topic change every 10 batches",
    "every_1": "topic change every batch", "unseen": "unseen text", "text": "your text",
    "contiguous": "no replicas", "eplb": "EPLB", "home": "home planner",
    "moving": "home planner, moving homes", "timed": "home planner, device times",
}  # fmt: skip
"""Names for people of traffic phases and planners, by the names that programs use. Forecasters keep their names."""

LINES: dict[str, dict[str, Any]] = {
    "learned": {"color": OURS, "linewidth": 2.4, "zorder": 4},
    "oracle": {"color": ORACLE, "linewidth": 1.3, "linestyle": (0, (4, 2)), "zorder": 3},
    "none": {"color": LIGHT, "linewidth": 1.6, "zorder": 1},
}
RIVAL = {"color": GREY, "linewidth": 1.2, "zorder": 2}

SETTINGS: Any = {
    "font.size": 9, "font.family": "sans-serif", "text.color": INK,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.linewidth": 0.8, "axes.labelsize": 9, "axes.axisbelow": True,
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlepad": 6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LIGHT, "grid.linewidth": 0.6, "grid.alpha": 0.7,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "xtick.major.size": 3, "ytick.major.size": 3,
    "figure.facecolor": "white", "figure.titlesize": 11, "figure.titleweight": "bold",
    "lines.solid_capstyle": "round", "image.cmap": "magma", "image.interpolation": "none",
}  # fmt: skip


def human(name: str) -> str:
    """The name for people of a phase, forecaster or planner; another name is kept, underscores as spaces."""
    return NAMES.get(name, name.replace("_", " "))


def line(forecaster: str) -> dict[str, Any]:
    """Keywords of `Axes.plot` for a forecaster's line."""
    return LINES.get(forecaster, RIVAL)


@contextmanager
def drawing() -> Iterator[None]:
    """Sets the style while the block runs; also a decorator of functions that draw."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches and its axes `[rows, columns]`."""
    figure = canvas(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def heading(figure: Figure, title: str, note: str = "") -> None:
    """Writes the finding over the picture, left-aligned, and below it in grey what is shown."""
    height = float(figure.get_figheight())
    top = 1 - 0.08 / height
    title_lines = title.count("\n") + 1
    figure.text(0.008, top, title, ha="left", va="top", fontsize=11, fontweight="bold")
    figure.text(0.008, top - 0.2 * title_lines / height, note, ha="left", va="top", fontsize=SMALL, color=GREY)
    used = 0.14 + 0.2 * title_lines + (0.14 * (note.count("\n") + 1) if note else 0)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - used / height))


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = GAP) -> None:
    """Writes names at the right end of lines, moved apart where they would overlap; call it after limits are set.

    Args:
        axes: Where the lines are.
        labels: Height of each line's end in data units, its name, its colour.
        gap: Least distance in axes heights.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    middle = float(np.mean(axes.get_xlim()))
    ordered = sorted(labels, key=lambda label: label[0])
    ends = [float(to_axes.transform((middle, height))[1]) for height, _, _ in ordered]
    for (_, text, colour), place in zip(ordered, spread(ends, gap), strict=True):
        axes.text(
            1.012, place, text, transform=axes.transAxes, color=colour, va="center", fontsize=SMALL + 0.5,
            fontweight="bold" if colour == OURS else "normal",
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places at least `gap` apart: [0, 0, 5] with gap 2 becomes [-1, 1, 5].

    The mean of pushing upwards from the first and pushing downwards from the last, both of which keep the gap.
    """
    up, down = list(places), list(places)
    for index in range(1, len(up)):
        up[index] = max(up[index], up[index - 1] + gap)
    for index in range(len(down) - 2, -1, -1):
        down[index] = min(down[index], down[index + 1] - gap)
    return [(high + low) / 2 for high, low in zip(up, down, strict=True)]


def phase_runs(phases: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal phases: name, first batch, batch after the last."""
    runs, start = [], 0
    for phase, members in groupby(phases):
        stop = start + len(list(members))
        runs.append((phase, start, stop))
        start = stop
    return runs


def name_phases(axes: Axes, phases: Sequence[str], inches: float, separator: str = "", named: bool = True) -> None:
    """Names the phases of traffic over the axes and tells them apart; draws nothing where there is one phase only.

    Args:
        axes: Batches lie at 0, 1, ... on its x axis.
        phases: Phase of each batch.
        inches: Width of the axes; names wrap to the width of their phase.
        separator: Colour of lines between phases; by default every second phase is shaded.
        named: Whether to write the names, too.
    """
    runs = phase_runs(phases)
    if len(runs) < 2:
        return
    for number, (phase, start, stop) in enumerate(runs):
        if separator and number:
            axes.axvline(start - 0.5, color=separator, linewidth=1)
        elif not separator and number % 2:
            axes.axvspan(start - 0.5, stop - 0.5, color=LIGHT, alpha=0.35, linewidth=0, zorder=0)
        if not named:
            continue
        letters = max(int((stop - start) / len(phases) * inches * 15), 6)
        axes.text(
            start - 0.5, 1.015, textwrap.fill(human(phase), letters), transform=axes.get_xaxis_transform(),
            fontsize=SMALL, color=INK, va="bottom", ha="left", linespacing=1.05,
        )  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Saves a PNG, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_bytes(to_png(figure))


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
