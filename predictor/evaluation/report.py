"""One HTML file and its pictures: how the learned predictor did, at a glance, without any service."""

import base64
import html
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from predictor.baselines.history import LastBatch, Oracle
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.plots import calibration_curve, heat_maps, ladder_bars, to_png
from predictor.evaluation.tables import CAPTIONS, REDUNDANT, Details, figure

Summaries = dict[str, dict[str, dict[str, float | None]]]
"""Stream, then forecaster, then figure."""
LEAST_GAP = 0.01
"""Regret of the last batch, by the low end of its interval, from which its share that is closed means something."""
NOMINAL = np.array([0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


def summarise(ladder: Comparison) -> Summaries:
    """The contract's figures of every stream and forecaster."""
    return {
        stream: {name: scores.summary() for name, scores in forecasters.items()}
        for stream, forecasters in ladder.items()
    }


def details(ladder: Comparison) -> Details:
    """All figures of every stream and forecaster, intervals included."""
    result: Details = {}
    for stream, forecasters in ladder.items():
        result[stream] = {name: scores.details() for name, scores in forecasters.items()}
        last = forecasters.get(LastBatch.name)
        for count in REDUNDANT:
            closed = f"gap_closed_r{count}"
            if last is None or not last.regret.get(count) or last.interval(f"regret_r{count}")[0] <= LEAST_GAP:
                continue
            for name, scores in forecasters.items():
                if name not in (LastBatch.name, Oracle.name):
                    value, interval = scores.gap_closed(last, count)
                    figures = {closed: round(value, 4), f"{closed}_interval": [round(end, 4) for end in interval]}
                    result[stream][name] |= figures
    return result


def layer_rows(ladder: Comparison, layer_names: list[str]) -> list[list[str | float]]:
    """Stream, forecaster, then the load error of each layer."""
    return [
        [stream, name, *(round(float(tv), 4) for tv in np.nanmean(scores.load_tv, axis=0))]
        for stream, forecasters in ladder.items()
        for name, scores in forecasters.items()
        if len(scores.load_tv[0]) == len(layer_names)
    ]


def figures(ladder: Comparison, layer_names: list[str]) -> dict[str, Figure]:
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


def _html_table(header: list[str], rows: list[list[str | float]]) -> str:
    def cell(value: str | float) -> str:
        return f"<td>{f'{value:.3f}' if isinstance(value, float) else html.escape(value)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def write_report(folder: Path, title: str, ladder: Comparison, layer_names: list[str]) -> None:
    """Writes report.html, which holds its pictures, and each picture as a PNG beside it."""
    found, streams = details(ladder), list(ladder)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for metric, caption in CAPTIONS.items():
        rows: list[list[str | float]] = [
            [name, *(figure(found[stream][name], metric) for stream in streams)] for name in ladder[streams[0]]
        ]
        shown = [row for row in rows if any(row[1:])]
        parts.append(f"<h2>{html.escape(caption)}</h2>" + _html_table(["forecaster", *streams], shown))
    parts.append("<h2>Total variation, layer by layer</h2>")
    parts.append(_html_table(["stream", "forecaster", *layer_names], layer_rows(ladder, layer_names)))
    for name, picture in figures(ladder, layer_names).items():
        png = to_png(picture)
        (folder / f"{name}.png").write_bytes(png)
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}img{max-width:100%}"
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
    (folder / "report.html").write_text(page + "\n".join(parts) + "\n")
