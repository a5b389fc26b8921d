"""Pictures of forecasts: errors of all forecasters, calibration, expert load over time beside the forecast.

Figures are drawn without a display and returned; the caller saves or logs them.
Shape suffixes: N batches, L MoE layers, E logical experts.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data.arrays import FloatArray
from data.style import GREY, INK, OURS, drawing, heading, human, panels

MOST_MAPS = 6
"""MoE layers in one picture of heat maps; of more, some are chosen evenly."""
IDLE = 0.05
"""Mean load, as a share of the mean over experts, from which an expert has a row in a heat map."""
TRAINED = ("learned", "adaptive")
"""Forecasters that stand out in the picture of errors."""
LEFT_OUT = ("uniform", "oracle")
"""Forecasters that the picture of errors leaves out: one would set the scale, the other's error is 0."""


@drawing()
def heat_maps(forecast_NLE: FloatArray, truth_NLE: FloatArray, layer_names: list[str], stream: str) -> Figure:
    """Share of each expert over time: forecast, truth and their difference, one column per MoE layer.

    Experts are sorted by mean load. Forecast and truth of a layer share one scale; blue means too low a forecast.
    """
    chosen = np.unique(np.linspace(0, len(layer_names) - 1, MOST_MAPS).round().astype(int))
    figure, axes = panels(0.9 + 2.1 * len(chosen), 5.2, 3, len(chosen), sharex=True)
    for column, layer in enumerate(chosen):
        mean = truth_NLE[:, layer].mean(0)
        order = np.argsort(-mean, kind="stable")[: max(int((mean > IDLE / len(mean)).sum()), 1)]
        forecast, truth = 100 * forecast_NLE[:, layer, order].T, 100 * truth_NLE[:, layer, order].T
        top = max(float(np.quantile(truth, 0.995)), 1e-9)
        scale: dict[str, Any] = {"aspect": "auto", "vmin": 0, "vmax": top, "cmap": "magma"}
        axes[0, column].imshow(forecast, **scale)
        image = axes[1, column].imshow(truth, **scale)
        difference = axes[2, column].imshow(forecast - truth, aspect="auto", vmin=-top, vmax=top, cmap="RdBu_r")
        bars = [(image, list(axes[:2, column]), "max"), (difference, [axes[2, column]], "both")]
        for (shown, beside, extend), label in zip(bars, ("% of tokens", "% points"), strict=True):
            bar = figure.colorbar(shown, ax=beside, pad=0.02, aspect=20 * len(beside), extend=extend)
            bar.outline.set_visible(False)
            if column == len(chosen) - 1:
                bar.set_label(label)
        axes[0, column].set_title(layer_names[layer].replace("_", " "))
        axes[2, column].set(xlabel="batch")
    for axis in axes.flat:
        axis.grid(False)
        axis.set(yticks=[])
    for axis, name in zip(axes[:, 0], ("forecast", "what came", "difference"), strict=True):
        axis.set_ylabel(name)
    note = "rows: experts of a MoE layer, the most loaded on top, idle ones left out; red: the forecast is too high"
    heading(figure, f"Expert load, {human(stream)}: forecast beside what came", note)
    return figure


@drawing()
def error_panels(errors: dict[str, dict[str, tuple[float, float, float]]]) -> Figure:
    """Load error of every forecaster: one panel per stream, one row per forecaster, a dot and its 95 % interval.

    Args:
        errors: By stream, then forecaster: the error and both ends of its interval.
    """
    names = [name for name in next(iter(errors.values())) if name not in LEFT_OUT]
    figure, axes = panels(8.6, 1.15 + 0.24 * len(names), 1, len(errors), sharex=True, sharey=True)
    for (stream, rows), axis in zip(errors.items(), axes[0], strict=True):
        for place, name in enumerate(names):
            if name not in rows:
                continue
            value, low, high = rows[name]
            ours = name in TRAINED
            colour = OURS if ours else GREY
            axis.plot([low, high], [place, place], color=colour, linewidth=3 if ours else 1.4)
            axis.plot([value], [place], "o", color=colour, markersize=7 if ours else 4.5)
            if ours:
                axis.text(high, place, f"  {value:.3f}", color=OURS, fontweight="bold", va="center")
        axis.set_title(human(stream).replace(" every ", "\nevery "))
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    largest = max(end for rows in errors.values() for name in names if name in rows for end in rows[name])
    axes[0, 0].set(xlim=(0, 1.08 * largest or 1), ylim=(len(names) - 0.4, -0.6))
    axes[0, 0].set_yticks(range(len(names)), names)
    for label, name in zip(axes[0, 0].get_yticklabels(), names, strict=True):
        label.set(color=OURS if name in TRAINED else INK, fontweight="bold" if name in TRAINED else "normal")
    left_out = " and ".join(LEFT_OUT)
    note = f"total variation of forecast and true load, 0 is perfect; bars: 95 % intervals; {left_out} (0) left out"
    heading(figure, "Forecast error by kind of traffic", note)
    return figure


@drawing()
def calibration_curve(nominal: FloatArray, covered: dict[str, FloatArray]) -> Figure:
    """How often intervals of a nominal coverage hold the truth, a panel per stream; the diagonal is perfect."""
    figure, axes = panels(8.6, 2.6, 1, len(covered), sharex=True, sharey=True)
    for (stream, values), axis in zip(covered.items(), axes[0], strict=True):
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (1, 2)))
        axis.plot(nominal, values, color=OURS, marker="o", markersize=3, linewidth=2.4)
        axis.set_title(human(stream).replace(" every ", "\nevery "))
        axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], aspect="equal")
    axes[0, 0].set(ylabel="share of experts within")
    figure.supxlabel("coverage that the forecast states", fontsize=9)
    heading(figure, "Are the stated intervals right?", "dotted diagonal: perfect; above it the intervals are too wide")
    return figure
