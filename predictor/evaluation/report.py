"""report.html of a predictor folder: the finding in one sentence, pictures, tables; one file, no service needed."""

import html
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data.html_page import picture, table, write_page
from data.style import human, save
from predictor.baselines.history import LastBatch, Oracle
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.plots import calibration_curve, error_panels, heat_maps
from predictor.evaluation.scores import layer_means
from predictor.evaluation.tables import CAPTIONS, REDUNDANT, Details, figure

Summaries = dict[str, dict[str, dict[str, float | None]]]
"""Stream, then forecaster, then figure."""
LEAST_GAP = 0.01
"""Regret of the last batch, by the low end of its interval, from which its share that is closed means something."""
NOMINAL = np.array([0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
BALANCEDNESS, SETTING = "balancedness_r16", "8 devices with 16 replica slots a layer"
"""The figure of `Scores.details` that the finding names, and what it was measured with."""
WHERE = {
    "steady": "On a steady mix of topics", "drift": "Where the mix of topics drifts",
    "every_10": "Where the topic changes every 10 batches", "every_1": "Where the topic changes every batch",
    "unseen": "On text unseen in training", "text": "On your text",
}  # fmt: skip
"""How a sentence about a stream begins."""


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


def layer_rows(ladder: Comparison, layer_names: list[str]) -> list[list[str | float | None]]:
    """Stream, forecaster, then the load error of each layer; None for a layer without load."""
    return [
        [stream, name, *layer_means(scores.load_tv)]
        for stream, forecasters in ladder.items()
        for name, scores in forecasters.items()
        if len(scores.load_tv[0]) == len(layer_names)
    ]


def figures(ladder: Comparison, layer_names: list[str]) -> dict[str, Figure]:
    """All pictures by name."""
    errors = {
        stream: {
            name: (float(np.nanmean(scores.load_tv)), *scores.interval("load_tv")) for name, scores in rows.items()
        }
        for stream, rows in ladder.items()
    }
    learned = {stream: forecasters["learned"] for stream, forecasters in ladder.items()}
    result = {"ladder": error_panels(errors)}
    covered = {stream: scores.coverage(NOMINAL) for stream, scores in learned.items()}
    result["calibration"] = calibration_curve(NOMINAL, covered)
    for stream, scores in learned.items():
        forecast, truth = np.stack(scores.share), np.stack(scores.true_share)
        result[f"heat_{stream}"] = heat_maps(forecast, truth, layer_names, stream)
    return result


def telling_stream(found: Details) -> str:
    """The stream in which the learned forecast's error lies furthest below the last batch's."""

    def lead(stream: str) -> float:
        rows = found[stream]
        return float(rows.get(LastBatch.name, rows["learned"])["load_tv"] - rows["learned"]["load_tv"])

    return max(found, key=lead)


def finding(found: Details) -> str:
    """The result in one sentence, from the stream that tells most."""
    stream = telling_stream(found)
    own, last = found[stream]["learned"], found[stream].get(LastBatch.name, {})
    where = WHERE.get(stream, f"On the stream '{human(stream)}'")
    sentence = f"{where}, the forecast's error is {own['load_tv']:.3f}"
    if last.get("load_tv") is not None:
        sentence += f", the last batch's {last['load_tv']:.3f}"
    if (balance := own.get(BALANCEDNESS)) is not None:
        sentence += f"; {SETTING} are balanced to {balance:.3f}"
        if last.get(BALANCEDNESS) is not None:
            sentence += f", from the last batch to {last[BALANCEDNESS]:.3f}"
    return sentence + "."


def alt_text(name: str, found: Details) -> str:
    """What a picture shows, for a reader who does not see it."""
    if name == "ladder":
        errors = [
            f"{human(stream)}: learned {rows['learned']['load_tv']:.3f}"
            + (f", last {rows[LastBatch.name]['load_tv']:.3f}" if LastBatch.name in rows else "")
            for stream, rows in found.items()
        ]
        return f"Forecast error by kind of traffic. {'; '.join(errors)}."
    if name == "calibration":
        covered = [f"{human(stream)} {rows['learned']['coverage_80']:.0%}" for stream, rows in found.items()]
        return f"Share of experts within the forecast's 80 % interval: {', '.join(covered)}."
    stream = name.removeprefix("heat_")
    error = found[stream]["learned"]["load_tv"]
    return f"Expert load batch by batch, {human(stream)}: forecast above what came; they differ by {error:.3f}."


def _tables(ladder: Comparison, found: Details, layer_names: list[str]) -> list[str]:
    streams, ours, parts = list(ladder), "learned", []
    for metric, caption in CAPTIONS.items():
        rows: list[list[str | float | None]] = [
            [name, *(figure(found[stream][name], metric) for stream in streams)] for name in ladder[streams[0]]
        ]
        if shown := [row for row in rows if any(row[1:])]:
            parts.append(f"<h3>{html.escape(caption)}</h3>" + table(["forecaster", *map(human, streams)], shown, ours))
    rows = [[human(str(stream)), str(name), *tv] for stream, name, *tv in layer_rows(ladder, layer_names)]
    layers = [name.replace("_", " ") for name in layer_names]
    parts.append("<h3>Total variation, layer by layer</h3>" + table(["stream", "forecaster", *layers], rows, ours))
    return parts


def write_report(folder: Path, title: str, ladder: Comparison, layer_names: list[str]) -> None:
    """Writes report.html, which holds its pictures, and each picture as a PNG beside it."""
    found, drawn = details(ladder), figures(ladder, layer_names)
    pictures = {}
    for name, made in drawn.items():
        save(made, folder / f"{name}.png")
        pictures[name] = picture(folder / f"{name}.png", alt_text(name, found))
    counted = ", ".join(f"{human(stream)}: {len(rows['learned'].load_tv)}" for stream, rows in ladder.items())
    first = ["ladder", f"heat_{telling_stream(found)}", "calibration"]
    parts = [
        *(pictures[name] for name in first),
        f"<h2>Tables</h2><p>Means over held-out test batches ({counted}); in brackets 95 % intervals.</p>",
        *_tables(ladder, found, layer_names),
        "<h2>Expert load on the other streams</h2>" if len(pictures) > len(first) else "",
        *(shown for name, shown in pictures.items() if name not in first),
    ]
    write_page(folder / "report.html", title, finding(found), parts)
