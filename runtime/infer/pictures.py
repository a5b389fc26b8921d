"""Pictures of a run: balancedness, replicas ahead of the load, where the time of a batch went.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data.arrays import FloatArray, IntArray
from data.style import (
    GREY,
    INK,
    LIGHT,
    OURS,
    OURS_PALE,
    SMALL,
    drawing,
    end_labels,
    heading,
    line,
    name_phases,
    panels,
)
from data.traces.loads import share_of
from runtime.engine.batch import BatchStats
from runtime.infer.report import POLICIES
from runtime.infer.verify import BatchCheck

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORECASTERS = {"contiguous": "none", "last": "last", "replicated": "learned", "oracle": "oracle"}
"""Whose line style each policy has."""
MOST_EXPERTS = 14
"""Experts in the picture of replicas: those with the largest load in any batch."""


@drawing()
def balance(checks: list[BatchCheck]) -> Figure:
    """Balancedness of every batch: without replicas, from the last batch, as it ran, and with the oracle."""
    figure, axes = panels(8.6, 3.6)
    axis, ends = axes[0, 0], []
    name_phases(axis, [check.phase for check in checks], 6.8)
    means = {}
    for name, label in POLICIES.items():
        values = [getattr(check, name) for check in checks]
        means[name] = float(np.mean(values))
        drawn = axis.plot(values, **line(FORECASTERS[name]), marker="o" if len(checks) == 1 else "")[0]
        colour = str(drawn.get_color()) if name != "contiguous" else GREY
        ends.append((values[-1], f"{label} {means[name]:.3f}", colour))
    lowest = min(getattr(check, name) for check in checks for name in POLICIES)
    axis.set(
        xlabel="batch", ylabel="balancedness", ylim=(min(0.4, lowest - 0.05), 1.02), xlim=(0, max(len(checks) - 1, 1))
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    end_labels(axis, ends)
    title = f"Balancedness {means['replicated']:.2f} with Switchcast, {means['contiguous']:.2f} without replicas"
    note = "mean device load / largest, 1 is perfect; means of all batches; the first has none before it"
    heading(figure, title, note)
    return figure


@drawing()
def replicas(load_NLE: IntArray, copies_NLE: IntArray, layer_names: list[str], phases: list[str]) -> Figure:
    """Load of the hottest experts of one layer, and how many copies each had when the batch ran.

    The layer is the one in which copies changed most.

    Args:
        load_NLE: Tokens of each expert in each batch.
        copies_NLE: Copies of each expert while the batch ran.
        layer_names: Names of the layers.
        phases: Which traffic each batch belongs to.
    """
    layer = int(np.abs(np.diff(copies_NLE, axis=0)).sum((0, 2)).argmax())
    share_NE = 100 * share_of(load_NLE[:, layer])
    experts = np.sort(np.argsort(-share_NE.max(0), kind="stable")[:MOST_EXPERTS])
    share, copies = share_NE[:, experts].T, copies_NLE[:, layer, experts].T
    figure, axes = panels(8.6, 1.5 + 0.24 * len(experts))
    axis = axes[0, 0]
    image = axis.imshow(share, aspect="auto", cmap="Greys", vmin=0, vmax=max(float(share.max()), 1.0))
    rows, batches = np.nonzero(copies > 1)
    axis.scatter(batches, rows, s=14 * (copies[rows, batches] - 1), color=OURS, edgecolors="white", linewidths=0.5)
    name_phases(axis, phases, 6.8, separator=INK)
    axis.set_yticks(range(len(experts)), [f"expert {expert}" for expert in experts])
    axis.set(xlabel="batch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, pad=0.01, label="% of the layer's tokens")
    bar.outline.set_visible(False)
    hit = copied_share(load_NLE[:, layer], copies_NLE[:, layer])
    title = f"Hot experts: {hit:.0%} of their load above an even share found more than one copy"
    name = layer_names[layer].replace("_", " ")
    note = (
        f"{name}, in which copies changed most, all experts counted; grey: load, the {len(experts)} hottest experts\n"
    )
    heading(
        figure, title, note + "blue: copies beside the home, in place before the batch ran, larger where there are more"
    )
    return figure


def copied_share(load_NE: IntArray, copies_NE: IntArray) -> float:
    """Of the load that experts have above an even share of their batch, the part that met more than one copy (0 to 1).

    Loads [6, 2, 1] with copies [2, 1, 1] give 1: expert 0 alone has more than 3.
    """
    above = np.maximum(load_NE - load_NE.mean(-1, keepdims=True), 0)
    return float((above * (copies_NE > 1)).sum() / max(float(above.sum()), 1e-9))


@drawing()
def times(stats: list[BatchStats]) -> Figure:
    """Milliseconds of each batch: what delays it above, and below what was done while the batch before ran."""
    ready = [cost.preparation for cost in stats]
    delays = {
        "forward": ([cost.compute_ms for cost in stats], INK, ""),
        "waiting for the plan": ([cost.exposed_ms for cost in stats], OURS, "////"),
    }
    meanwhile = {
        "forecast": ([each.forecast_ms if each else 0.0 for each in ready], OURS, ""),
        "plan": ([each.plan_ms if each else 0.0 for each in ready], OURS_PALE, "////"),
        "copies": ([each.move_ms if each else 0.0 for each in ready], LIGHT, ""),
    }
    figure, axes = panels(8.6, 3.8, 2, 1, sharex=True, height_ratios=[3, 2])
    _bars(axes[0, 0], delays)
    _bars(axes[1, 0], meanwhile)
    axes[0, 0].set(ylabel="delays the batch,\nms")
    axes[1, 0].set(ylabel="done before,\nms", xlabel="batch")
    forward, waited = (np.nansum(values[1:] or values) for values, *_ in delays.values())
    title = f"Batches waited for their plan for {float(waited / max(forward, 1e-9)):.1%} of the time of their forward"
    note = "but the first, which has no batch before it; below: work of a second thread while the batch before ran"
    heading(figure, title, f"{note}; at the right medians")
    return figure


def _bars(axis: Any, parts: dict[str, tuple[list[float], str, str]]) -> None:
    """Stacked bars, one a batch, with the median of each part."""
    bottom: FloatArray = np.zeros(len(next(iter(parts.values()))[0]))
    for place, (name, (values, colour, hatch)) in enumerate(parts.items()):
        heights = np.nan_to_num(np.array(values, dtype=np.float64))
        axis.bar(range(len(values)), heights, 0.8, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        bottom = bottom + heights
        axis.text(
            1.012, 0.12 + 0.2 * place, f"{name} {np.median(heights):.1f}", transform=axis.transAxes, fontsize=SMALL,
            color=GREY if colour == LIGHT else colour,
        )  # fmt: skip
    top = float(bottom[1:].max(initial=0.0)) or float(bottom.max(initial=1.0))
    if bottom[0] > 2 * top:  # the first batch compiles kernels and fills caches
        axis.text(-0.4, 1.08 * top, f"{bottom[0]:,.0f}", fontsize=SMALL, color="white", rotation=90, va="top")
        axis.set(ylim=(0, 1.12 * top))
    axis.set(xlim=(-0.6, len(bottom) - 0.4))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="x", visible=False)
