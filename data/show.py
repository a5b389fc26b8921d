"""Shows the statistics of a trace: a table of skew and drift for each MoE layer, and two plots of the loads over time.

Run it with `python -m data.show outputs/traces/switch-mini-64`; in a pipe, the last line of stdout is one
JSON document.
"""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.cli import from_command_line, print_json, user_errors
from data.style import GREY, INK, LIGHT, SMALL, drawing, heading, name_phases, panels, save
from data.traces.loads import share_of
from data.traces.statistics import TraceStatistics, measure, step_variation
from data.traces.store import StoredTrace, open_trace

MOST_MAPS = 12  # layers in one picture
IDLE = 0.05
"""Mean load, as a share of the mean over experts, from which an expert has a row in the picture."""
CHANGING = 1.5
"""Change from batch to batch, over what sampling alone makes, from which the title speaks of change."""
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}


def table(trace: StoredTrace, skew: TraceStatistics) -> Table:
    """Makes a table of the statistics with one row per MoE layer."""
    layout = trace.layout
    padding = "" if skew.padding is None else f", {skew.padding:.0%} of positions padding"
    title = f"{layout.model_id}: {trace.num_batches} batches, {layout.num_experts} experts{padding}"
    counted = "tokens" if layout.experts_per_token == 1 else "assignments"
    shown = Table("MoE layer", counted, "hottest / mean", "dropped", "step to step TV", "sampling alone", title=title)
    for layer, name in enumerate(layout.layer_names):
        dropped = "unknown" if skew.dropped is None else f"{skew.dropped[layer]:.1%}"
        shown.add_row(
            name, f"{skew.tokens[layer]:,}", _figure(skew.hottest[layer], 1), dropped if skew.tokens[layer] else "-",
            _figure(skew.step_tv[layer], 3), _figure(skew.floor_tv[layer], 3),
        )  # fmt: skip
    return shown


def _figure(value: float, digits: int) -> str:
    """A figure as text; a layer without load has none."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _drawn(skew: TraceStatistics) -> list[int]:
    """The layers of a picture: the first ones with load."""
    return [int(layer) for layer in np.flatnonzero(skew.tokens)[:MOST_MAPS]]


@drawing()
def heat_maps(trace: StoredTrace, skew: TraceStatistics, path: Path) -> None:
    """Expert by time for each MoE layer, experts sorted by load; colour is the share times the number of experts."""
    layers, num_experts = _drawn(skew), skew.loads.shape[-1]
    figure, axes = panels(8.6, 0.9 + 1.35 * len(layers), len(layers), sharex=True)
    for layer, axis in zip(layers, axes[:, 0], strict=True):
        share = share_of(skew.loads[:, layer])
        order = np.argsort(-share.mean(0))
        used = max(int((share.mean(0) > IDLE / num_experts).sum()), 1)
        image = axis.imshow(share[:, order[:used]].T * num_experts, aspect="auto", cmap="magma", vmin=0, vmax=6)
        axis.set(ylabel=trace.layout.layer_names[layer].replace("_", " "), yticks=[])
        axis.grid(False)
        if rest := num_experts - used:
            text = (
                f"{rest} of {num_experts} experts, not shown, get {share[:, order[used:]].sum(1).mean():.1%} of tokens"
            )
            box = {"facecolor": "black", "edgecolor": "none", "pad": 1.5, "alpha": 0.8}
            axis.text(0.995, 0.05, text, transform=axis.transAxes, ha="right", color="white", fontsize=SMALL, bbox=box)
        name_phases(axis, skew.phases or (), 7.4, separator="white", named=layer == layers[0])
    axes[-1, 0].set(xlabel="batch")
    bar = figure.colorbar(image, ax=axes, label="load, times the mean", extend="max", aspect=40, pad=0.015)
    bar.outline.set_visible(False)
    changes = np.nansum(skew.step_tv) > CHANGING * np.nansum(skew.floor_tv)
    finding = ": hot experts change with the topic" if changes and len(set(skew.phases or ())) > 1 else ""
    heading(figure, f"Expert load over time{finding}", "rows: experts of a MoE layer, the most loaded on top")
    save(figure, path)


@drawing()
def drift_plot(trace: StoredTrace, skew: TraceStatistics, path: Path) -> None:
    """Total variation from batch to batch: one panel a MoE layer, shaded up to what sampling alone makes."""
    layers, names = _drawn(skew), trace.layout.layer_names
    rows = -(-len(layers) // 2)
    figure, axes = panels(8.6, 1.1 + 1.5 * rows, rows, min(len(layers), 2), sharex=True, sharey=True)
    variation = step_variation(skew.loads)
    top = min(1.3 * max([0.0, *variation[np.isfinite(variation)]]), 1.05) or 1
    for layer, axis in zip(layers, axes.flat, strict=False):
        axis.axhspan(0, np.nan_to_num(skew.floor_tv[layer]), color=LIGHT, linewidth=0, zorder=0)
        axis.plot(np.arange(1, len(skew.loads)), variation[:, layer], color=INK, linewidth=0.8)
        name_phases(axis, skew.phases or (), 3.9, separator=GREY, named=layer in layers[:2])
        means = f"mean {_figure(skew.step_tv[layer], 2)}, sampling alone {_figure(skew.floor_tv[layer], 2)}"
        label = f"{names[layer].replace('_', ' ')}: {means}"
        axis.text(0.01, 0.95, label, transform=axis.transAxes, va="top", fontsize=SMALL, bbox=WHITE)
        axis.set(ylim=(0, top), xlim=(0, max(len(skew.loads) - 1, 1)))
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set(xlabel="batch")
    note = "total variation of expert shares from one batch to the next; shaded: what sampling alone makes on average"
    heading(figure, "How much the load differs from the batch before", note)
    save(figure, path)


def show(trace: Path, out: Path | None = None) -> dict[str, Any]:
    """Prints how skewed the loads of a trace are and how they change, and saves plots of both.

    Args:
        trace: Folder of the trace.
        out: Folder for load.png and drift.png; by default the folder of the trace.

    Raises:
        ValueError: If the folder holds no complete trace, or one without any load.
    """
    stored = open_trace(trace)
    console = Console(stderr=True)
    with console.status(f"reading {stored.num_batches} batches"):
        skew = measure(stored)
    if not skew.tokens.any():
        raise ValueError(f"{trace} holds no load in any of its {stored.num_batches} batches; collect it again")
    Console().print(table(stored, skew))
    folder = out or trace
    heat_maps(stored, skew, folder / "load.png")
    drift_plot(stored, skew, folder / "drift.png")
    console.print(f"Saved {folder / 'load.png'} and {folder / 'drift.png'}")
    rounded = {
        name: [None if np.isnan(value) else round(float(value), 4) for value in getattr(skew, name)]
        for name in ("hottest", "step_tv", "floor_tv")
    }
    dropped = None if skew.dropped is None else np.round(skew.dropped, 4).tolist()
    shape = list(skew.loads.shape)
    return {"trace": str(trace), "shape": shape, "padding": skew.padding, "dropped": dropped, **rounded}


def main() -> None:
    """Command line of `show`: a table, then one JSON document."""
    with user_errors():
        print_json(from_command_line(show))


if __name__ == "__main__":
    main()
