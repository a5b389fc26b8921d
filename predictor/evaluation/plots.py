"""Pictures of forecasts. Figures are drawn without a display and returned; whoever asked saves or logs them.

Shape suffixes: N batches, L MoE layers, E logical experts.
"""

import io

import numpy as np
from matplotlib.figure import Figure

from data.arrays import FloatArray


def heat_maps(forecast_NLE: FloatArray, truth_NLE: FloatArray, layer_names: list[str], title: str) -> Figure:
    """Share of each expert over time, forecast above truth, a column per MoE layer; experts sorted by mean load."""
    figure = Figure(figsize=(3.2 * len(layer_names), 5), layout="constrained")
    axes = figure.subplots(2, len(layer_names), squeeze=False, sharex=True, sharey=True)
    for column, name in enumerate(layer_names):
        order = np.argsort(-truth_NLE[:, column].mean(0), kind="stable")
        top = max(float(np.quantile(truth_NLE[:, column], 0.995)), 1e-9)
        for axis, share, label in zip(axes[:, column], (forecast_NLE, truth_NLE), ("forecast", "truth"), strict=True):
            axis.imshow(share[:, column, order].T, aspect="auto", vmin=0, vmax=top, cmap="magma", interpolation="none")
            axis.set_title(f"{name}: {label}", fontsize=9)
        axes[1, column].set_xlabel("batch")
    axes[0, 0].set_ylabel("expert, by load")
    figure.suptitle(title)
    return figure


def ladder_bars(load_tv: dict[str, dict[str, float]]) -> Figure:
    """Load error of every forecaster, grouped by stream."""
    streams, names = list(load_tv), list(next(iter(load_tv.values())))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = np.arange(len(streams)) + (index - (len(names) - 1) / 2) * width
        axis.bar(places, [load_tv[stream].get(name, np.nan) for stream in streams], width, label=name)
    axis.set_xticks(range(len(streams)), streams)
    axis.set_ylabel("total variation of the load")
    axis.legend(ncols=4, fontsize=8)
    return figure


def calibration_curve(nominal: FloatArray, covered: dict[str, FloatArray]) -> Figure:
    """How often intervals of a nominal coverage hold the truth, a line per stream; the diagonal is perfect."""
    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name, values in covered.items():
        axis.plot(nominal, values, marker="o", markersize=3, label=name)
    axis.set_xlabel("nominal coverage")
    axis.set_ylabel("share of experts within the interval")
    axis.legend(fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
