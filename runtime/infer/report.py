"""What `runtime.infer` found: one document, as tables for people, and as a plot."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.files import whole_file
from runtime.engine.batch import BatchStats
from runtime.engine.engine import Engine
from runtime.infer.verify import BatchCheck
from runtime.telemetry.recorder import over_batches


def summarise(checks: list[BatchCheck], costs: list[BatchStats], engine: Engine) -> dict[str, Any]:
    """The JSON document: sums over batches, means of balancedness and error, medians of milliseconds."""
    ready = [cost.preparation for cost in costs if cost.preparation]
    errors = [check.load_tv for check in checks if check.load_tv is not None]
    differences = [check.logit_difference for check in checks if check.logit_difference is not None]
    alike = [check.same_argmax * check.tokens for check in checks if check.same_argmax is not None]
    tokens = sum(check.tokens for check in checks)
    names = ("contiguous", "replicated", "oracle")
    return {
        "model": engine.switch.layout.model_id,
        "processes": engine.ranks.world,
        "devices": engine.home.num_devices,
        "redundant": engine.home.num_redundant_experts,
        "batches": len(checks),
        "tokens": tokens,
        "max_logit_difference": max(differences, default=None),
        "same_argmax": sum(alike) / tokens if alike else None,
        "balancedness": {name: float(np.mean([getattr(check, name) for check in checks])) for name in names},
        "load_tv": float(np.mean(errors)) if errors else None,
        "moves": sum(item.moves for item in ready),
        "bytes": sum(item.nbytes for item in ready),
        "late": engine.controller.late,
        "fallbacks": sum(engine.controller.fallbacks.values()),
        "sent_share": float(sum(cost.sent.sum() for cost in costs) / max(1, sum(cost.load.sum() for cost in costs))),
        "peak_gib": [round(peak, 3) for peak in engine.ranks.peak_gib()],
        "ms": {
            "forecast": median(item.forecast_ms for item in ready) if ready else None,
            "plan": median(item.plan_ms for item in ready) if ready else None,
            "move": median(item.move_ms for item in ready) if ready else None,
            "compute": median(cost.compute_ms for cost in costs),
            "slowest_device": median(float(cost.busy_ms.max(-1).sum()) for cost in costs),
            "waited": median(float(cost.waited_ms.max(-1).sum()) for cost in costs),
            "exposed": median(cost.exposed_ms for cost in costs),
        },
        "cache": None if engine.replicated.cache is None else engine.replicated.cache.report(),
        "layers": over_batches(costs, engine.switch.layout.layer_names),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table for people."""
    table = Table(
        title=f"{report['model']}: {report['batches']} batches, {report['tokens']:,} tokens", show_header=False
    )
    balance = report["balancedness"]
    rows = {
        "largest logit difference to the plain model": _or_dash(report["max_logit_difference"], ".1e"),
        "same likeliest token": _or_dash(report["same_argmax"], ".2%"),
    }
    if report["devices"] > 1:
        rows |= {
            f"balancedness on {report['devices']} devices, no replicas": f"{balance['contiguous']:.3f}",
            f"  with {report['redundant']} replica slots a layer": f"{balance['replicated']:.3f}",
            "  with the oracle's forecast": f"{balance['oracle']:.3f}",
        }
    rows["forecast error (total variation)"] = _or_dash(report["load_tv"], ".3f")
    if report["redundant"]:
        moved = f", {report['bytes'] / 1e6:.1f} MB" if report["cache"] is None else ", read by the caches"
        rows["replicas placed"] = f"{report['moves']}{moved}, {report['late']} times late"
    if report["processes"] > 1:
        rows["tokens sent to another process"] = f"{report['sent_share']:.1%}"
    rows["peak memory of each process, GiB"] = ", ".join(f"{peak:.2f}" for peak in report["peak_gib"])
    if report["cache"] is not None:
        tier = report["cache"]["device"]
        rows["experts that were there when asked for"] = f"{tier['hit_rate']:.1%}"
        rows["prefetched experts that were used"] = f"{tier['prefetch_precision']:.1%}"
        read = tier["demand_bytes"] + tier["prefetch_bytes"]
        rows["bytes read, of them ahead"] = f"{read / 1e6:.1f} MB, {tier['prefetch_bytes'] / max(read, 1):.1%}"
        rows["time waited for experts"] = f"{tier['stall_ms']:.0f} ms"
    rows |= {f"median ms: {name}": _or_dash(ms, ".1f") for name, ms in report["ms"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    layers = Table("layer", "balancedness", "busiest device, ms", "waited, ms", "sent", "moves")
    for row in report["layers"]:
        *figures, sent, moves = (
            row[name] for name in ("balancedness", "busy_max_ms", "waited_ms", "sent_share", "moves")
        )
        layers.add_row(row["layer"], *(f"{figure:.3f}" for figure in figures), f"{sent:.1%}", str(moves))
    console.print(layers)


def _or_dash(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def plot(checks: list[BatchCheck], path: Path) -> None:
    """Balancedness of every batch: without replicas, as it ran, and with the oracle."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("oracle", "oracle"), ("replicated", "as it ran"), ("contiguous", "no replicas")):
        axes.plot([getattr(check, name) for check in checks], label=label, marker=".")
    axes.set(xlabel="batch", ylabel="balancedness", ylim=(0, 1.02), title="Mean device load / largest device load")
    axes.legend(loc="lower right")
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=120, format="png")
