"""One HTML file and its pictures: how the learned predictor did, at a glance, without any service."""

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from predictor.export import Summaries
from predictor.ladder import Ladder
from predictor.plots import calibration_curve, heat_maps, ladder_bars, to_png

NOMINAL = np.array([0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
METRICS = {
    "load_tv": "Total variation of forecast and true load (lower is better)",
    "hot_recall": "Share of the 16 hottest experts found",
    "token_top1": "Share of tokens whose expert was named",
    "balancedness": "Balancedness, 8 devices, 16 redundant experts (1 is perfect)",
    "regret": "How much more the oracle's forecast balances, 16 redundant experts",
    "balancedness_8": "Balancedness, 8 devices, 8 redundant experts",
    "regret_8": "How much more the oracle's forecast balances, 8 redundant experts",
}


def summarise(ladder: Ladder) -> Summaries:
    """The contract's figures of every stream and forecaster."""
    return {
        stream: {name: scores.summary() for name, scores in forecasters.items()}
        for stream, forecasters in ladder.items()
    }


def details(ladder: Ladder) -> dict[str, dict[str, dict[str, Any]]]:
    """All figures of every stream and forecaster, intervals included."""
    return {
        stream: {name: scores.details() for name, scores in forecasters.items()}
        for stream, forecasters in ladder.items()
    }


def layer_rows(ladder: Ladder, layer_names: list[str]) -> list[list[str | float]]:
    """Stream, forecaster, then the load error of each layer."""
    return [
        [stream, name, *(round(float(tv), 4) for tv in np.nanmean(scores.load_tv, axis=0))]
        for stream, forecasters in ladder.items()
        for name, scores in forecasters.items()
        if len(scores.load_tv[0]) == len(layer_names)
    ]


def figures(ladder: Ladder, layer_names: list[str]) -> dict[str, Figure]:
    """All pictures by name."""
    tv = {s: {n: f["load_tv"] or 0.0 for n, f in rows.items()} for s, rows in summarise(ladder).items()}
    learned = {stream: forecasters["learned"] for stream, forecasters in ladder.items()}
    result = {"ladder": ladder_bars(tv)}
    covered = {stream: scores.coverage(NOMINAL) for stream, scores in learned.items()}
    result["calibration"] = calibration_curve(NOMINAL, covered)
    for stream, scores in learned.items():
        forecast, truth = np.stack(scores.share), np.stack(scores.true_share)
        result[f"heat_{stream}"] = heat_maps(forecast, truth, layer_names, f"Expert load, {stream}")
    return result


def _html_table(header: list[str], rows: list[list[str | float | None]]) -> str:
    def cell(value: str | float | None) -> str:
        return f"<td>{'' if value is None else f'{value:.3f}' if isinstance(value, float) else html.escape(value)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def write_report(folder: Path, title: str, ladder: Ladder, layer_names: list[str]) -> None:
    """Writes report.html, which holds its pictures, and each picture as a PNG beside it."""
    summaries = summarise(ladder)
    streams = list(summaries)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for metric, caption in METRICS.items():
        rows = [[name, *(summaries[s][name][metric] for s in streams)] for name in summaries[streams[0]]]
        parts.append(f"<h2>{html.escape(caption)}</h2>" + _html_table(["forecaster", *streams], rows))
    parts.append("<h2>Total variation, layer by layer</h2>")
    parts.append(
        _html_table(["stream", "forecaster", *layer_names], [list(r) for r in layer_rows(ladder, layer_names)])
    )
    for name, figure in figures(ladder, layer_names).items():
        png = to_png(figure)
        (folder / f"{name}.png").write_bytes(png)
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}img{max-width:100%}"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
    (folder / "report.html").write_text(page + "\n".join(parts) + "\n")
