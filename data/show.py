"""Shows the statistics of a trace: a table of skew and drift for each MoE layer, and two plots of the loads over time.

Run it with `python -m data.show outputs/traces/switch-mini-64`; the last line of stdout is one JSON document.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.cli import from_command_line, user_errors
from data.files import whole_file
from data.traces.loads import share_of
from data.traces.statistics import TraceStatistics, measure, step_variation
from data.traces.store import StoredTrace, open_trace

MOST_MAPS = 12  # layers in one picture


def table(trace: StoredTrace, skew: TraceStatistics) -> Table:
    """Makes a table of the statistics with one row per MoE layer."""
    layout = trace.layout
    padding = "" if skew.padding is None else f", {skew.padding:.0%} of encoder positions padding"
    title = f"{layout.model_id}: {trace.num_batches} batches, {layout.num_experts} experts{padding}"
    shown = Table("MoE layer", "tokens", "hottest / mean", "dropped", "step to step TV", "sampling alone", title=title)
    for layer, name in enumerate(layout.layer_names):
        dropped = "unknown" if skew.dropped is None else f"{skew.dropped[layer]:.1%}"
        shown.add_row(
            name, f"{skew.tokens[layer]:,}", f"{skew.hottest[layer]:.1f}", dropped,
            f"{skew.step_tv[layer]:.3f}", f"{skew.floor_tv[layer]:.3f}",
        )  # fmt: skip
    return shown


def heat_maps(trace: StoredTrace, skew: TraceStatistics, path: Path) -> None:
    """Expert by time for each MoE layer, experts sorted by load; colour is the share times the number of experts."""
    from matplotlib.figure import Figure

    layers = min(len(trace.layout.layers), MOST_MAPS)
    figure = Figure(figsize=(10, 1.2 + 1.7 * layers), layout="constrained")
    for layer, axes in enumerate(np.atleast_1d(figure.subplots(layers, sharex=True))):
        share = share_of(skew.loads[:, layer])
        order = np.argsort(-share.mean(0))
        image = axes.imshow(
            share[:, order].T * share.shape[1], aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=6
        )
        axes.set(ylabel=f"{trace.layout.layer_names[layer]}\nexpert, by load", yticks=[])
        figure.colorbar(image, ax=axes, label="times the mean", extend="max")
    axes.set(xlabel="batch")
    _save(figure, path)


def drift_plot(trace: StoredTrace, skew: TraceStatistics, path: Path) -> None:
    """Total variation from batch to batch of each MoE layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots()
    variation = step_variation(skew.loads)
    for layer, name in list(enumerate(trace.layout.layer_names))[:MOST_MAPS]:
        axes.plot(np.arange(1, len(skew.loads)), variation[:, layer], label=name, linewidth=0.9)
    axes.axhline(float(skew.floor_tv.mean()), color="black", linestyle=":", label="sampling alone")
    axes.set(xlabel="batch", ylabel="total variation", title="How much the load differs from the batch before", ylim=0)
    axes.legend(ncols=2, fontsize="small", loc="upper left")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def show(trace: Path, out: Path | None = None) -> dict[str, Any]:
    """Prints how skewed the loads of a trace are and how they change, and saves plots of both.

    Args:
        trace: Folder of the trace.
        out: Folder for load.png and drift.png; by default the folder of the trace.

    Raises:
        ValueError: If the folder holds no complete trace.
    """
    stored = open_trace(trace)
    console = Console(stderr=True)
    with console.status(f"reading {stored.num_batches} batches"):
        skew = measure(stored)
    Console().print(table(stored, skew))
    folder = out or trace
    heat_maps(stored, skew, folder / "load.png")
    drift_plot(stored, skew, folder / "drift.png")
    console.print(f"Saved {folder / 'load.png'} and {folder / 'drift.png'}")
    rounded = {name: np.round(getattr(skew, name), 4).tolist() for name in ("hottest", "step_tv", "floor_tv")}
    dropped = None if skew.dropped is None else np.round(skew.dropped, 4).tolist()
    shape = list(skew.loads.shape)
    return {"trace": str(trace), "shape": shape, "padding": skew.padding, "dropped": dropped, **rounded}


def main() -> None:
    """Command line of `show`; the last line of stdout is one JSON document."""
    with user_errors():
        print(json.dumps(from_command_line(show)))


if __name__ == "__main__":
    main()
