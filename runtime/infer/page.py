"""report.html of a run: the finding, pictures, tables; one file that holds all of it."""

from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import IntArray
from data.html_page import picture, table, write_page
from data.style import save
from data.traces.loads import share_of
from runtime.engine.batch import BatchStats
from runtime.infer.pictures import balance, replicas, times
from runtime.infer.report import POLICIES
from runtime.infer.verify import BatchCheck


def write_run(
    folder: Path, report: dict[str, Any], checks: list[BatchCheck], stats: list[BatchStats], copies: list[IntArray]
) -> None:
    """Writes report.html and its pictures.

    Args:
        folder: Where to.
        report: The JSON document of the run.
        checks: Each batch beside the plain model.
        stats: What each batch took.
        copies: Copies of each expert while each batch ran, `[L, E]`.
    """
    from predictor.evaluation.plots import heat_maps  # imports matplotlib

    names = [row["layer"] for row in report["layers"]]
    found = report["balancedness"]
    drawn = {"balancedness": (balance(checks), _of_balance(found))}
    load_NLE = np.stack([cost.load for cost in stats])
    if report["redundant"] and len(stats) > 1:
        strip = replicas(load_NLE, np.stack(copies), names, [check.phase for check in checks])
        drawn["replicas"] = (strip, "Load of the hottest experts of a layer, batch by batch, and their copies.")
    if all(cost.measured for cost in stats):
        drawn["times"] = (times(stats), "Milliseconds of each batch, and of what was prepared before it.")
    made = [cost.preparation.forecast if cost.preparation else None for cost in stats]
    if forecasts := [(each.share, cost.load) for each, cost in zip(made, stats, strict=True) if each is not None]:
        forecast, truth = (np.stack(part) for part in zip(*forecasts, strict=True))
        maps = heat_maps(forecast, np.nan_to_num(share_of(truth)), names, "this run")
        drawn["forecast"] = (maps, "Expert load batch by batch: the forecast above what came.")
    parts = []
    for name, (figure, alt) in drawn.items():
        save(figure, folder / f"{name}.png")
        parts.append(picture(folder / f"{name}.png", alt))
    parts += ["<h2>Layers</h2>", _layers(report), "<h2>Setting</h2>", _setting(report)]
    write_page(folder / "report.html", f"{report['model']} with Switchcast", _finding(report), parts)


def _finding(report: dict[str, Any]) -> str:
    found, difference = report["balancedness"], report["max_logit_difference"]
    balanced = (
        f"{report['batches']} batches on {report['devices']} devices were balanced to {found['replicated']:.3f}, "
        f"without replicas to {found['contiguous']:.3f}, with the oracle to {found['oracle']:.3f}"
    )
    if difference is None:
        return f"{balanced}; outputs were not compared."
    same = "100%" if report["same_argmax"] == 1 else f"{report['same_argmax']:.3%}"
    return (
        f"{balanced}; logits differ by at most {difference:.1e} from the plain model's, likeliest tokens agree: {same}."
    )


def _of_balance(found: dict[str, float]) -> str:
    means = ", ".join(f"{label} {found[name]:.3f}" for name, label in POLICIES.items())
    return f"Balancedness of every batch; means: {means}."


def _layers(report: dict[str, Any]) -> str:
    header = ["layer", "batches", "balancedness", "busiest device, ms", "moves"]
    rows = [
        [
            row["layer"].replace("_", " "),
            str(row["batches"]),
            row["balancedness"],
            row["busy_max_ms"],
            str(row["moves"]),
        ]
        for row in report["layers"]
    ]
    return table(header, rows)


def _setting(report: dict[str, Any]) -> str:
    forecasts = report["forecasts"]
    rows = {
        "tokens": f"{report['tokens']:,}", "processes": str(report["processes"]), "device": report["device"],
        "dtype": report["dtype"], "replica slots a layer": str(report["redundant"]), "forecasts by": forecasts["by"],
        "forecasts used, late, replaced": ", ".join(str(forecasts[name]) for name in ("used", "late", "replaced")),
        "load error of the forecasts": "" if report["load_tv"] is None else f"{report['load_tv']:.3f}",
        "experts moved": str(report["moves"]),
    }  # fmt: skip
    return table(["what", "value"], [[name, value] for name, value in rows.items()])
