"""The result of `runtime.infer`: the JSON document, the frame printed at the end, tables of details."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data.models.weights import BUNDLED
from data.shell import typed
from data.style import ORACLE, OURS
from runtime.engine.batch import BatchStats
from runtime.engine.controller import Controller
from runtime.engine.engine import Engine
from runtime.infer.verify import BatchCheck
from runtime.telemetry.recorder import over_batches

POLICIES = {"contiguous": "no replicas", "last": "last", "replicated": "Switchcast", "oracle": "oracle"}
"""Fields of `BatchCheck` that hold a balancedness, and their names in pictures; the frame names the forecaster."""
COLOURS = {"replicated": f"bold {OURS}", "oracle": ORACLE}
BAR = 36
"""Characters of a bar in the frame that stands for perfect balance."""
EQUAL = 1e-3
"""Largest logit difference that is called equal in float32: matrix kernels add up groups of another size in another
order."""
ROUNDED = 0.01
"""Largest share of flipped routes, and of differing likeliest tokens, that is called rounding in bfloat16.

Chosen, not measured: on CPUs none differ, and GPUs were not within reach.
"""


def summarise(checks: list[BatchCheck], costs: list[BatchStats], engine: Engine) -> dict[str, Any]:
    """The JSON document: sums over batches, means of balancedness and error, medians of milliseconds."""
    ready = [cost.preparation for cost in costs if cost.preparation]
    errors = [check.load_tv for check in checks if check.load_tv is not None]
    differences = [check.logit_difference for check in checks if check.logit_difference is not None]
    alike = [check.same_argmax * check.tokens for check in checks if check.same_argmax is not None]
    tokens = sum(check.tokens for check in checks)
    layout = engine.loaded.layout
    return {
        "model": layout.model_id,
        "revision": layout.revision,
        "dtype": str(engine.loaded.model.dtype).removeprefix("torch."),
        "device": engine.ranks.device.type,
        "processes": engine.ranks.world,
        "devices": engine.home.num_devices,
        "redundant": engine.home.num_redundant_experts,
        "expert_overhead_tokens": engine.replicated.expert_overhead_tokens,
        "between_nodes": engine.replicated.between_nodes,
        "batches": len(checks),
        "tokens": tokens,
        "max_logit_difference": max(differences, default=None),
        "same_argmax": sum(alike) / tokens if alike else None,
        "differing_tokens": sum(check.differing_tokens or 0 for check in checks) if alike else None,
        "routes": sum(check.routes for check in checks),
        "flipped_routes": sum(check.flipped_routes for check in checks),
        "balancedness": {name: float(np.mean([getattr(check, name) for check in checks])) for name in POLICIES},
        "load_tv": float(np.mean(errors)) if errors else None,
        "moves": sum(item.moves for item in ready),
        "bytes": sum(item.nbytes for item in ready),
        "forecasts": forecast_health(costs, engine.controller),
        "sent_share": float(sum(cost.sent.sum() for cost in costs) / max(1, sum(cost.load.sum() for cost in costs))),
        "expert_mib": 4 * layout.num_layers * layout.num_experts * 2 * layout.d_model * layout.d_ff / 2**20,
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
        "layers": over_batches(costs, layout.layer_names),
    }


def forecast_health(costs: list[BatchStats], controller: Controller) -> dict[str, Any]:
    """Who forecasts, how often it prepared a batch, came too late, or was replaced, and by which errors.

    `replaced` counts each time past loads or the active plan took the place of a forecast or of the plan made from it.
    """
    name = controller.forecaster.name if controller.forecaster else "none"
    made = [cost.preparation.forecast for cost in costs if cost.preparation]
    return {
        "by": name,
        "used": sum(forecast is not None and forecast.source == name for forecast in made),
        "late": controller.late,
        "replaced": sum(controller.fallbacks.values()),
        "reasons": dict(controller.fallbacks),
    }


def fallback_warning(report: dict[str, Any]) -> str | None:
    """One line about replaced forecasts, with the most frequent reason and what to do; None if none was replaced."""
    health = report["forecasts"]
    if not health["replaced"]:
        return None
    reason = max(health["reasons"], key=health["reasons"].get)
    others = f" and {len(health['reasons']) - 1} other reasons" if len(health["reasons"]) > 1 else ""
    todo = f"train {report['predictor']} again" + ("" if report["allow_fallback"] else ", or add --allow-fallback")
    return (
        f"forecasts were replaced {health['replaced']} times by past loads or the old plan, because of "
        f"{' '.join(reason.split())}{others}; outputs are not affected, balance is; {todo}"
    )


def show(report: dict[str, Any], console: Console, details: bool = False) -> None:
    """Prints the result in a frame: what ran, whether outputs are equal, the balance, what to type next.

    Args:
        report: The JSON document, with the folder it lies in as `out` and the predictor's as `predictor`.
        console: Where to print.
        details: Whether to print the tables of times, memory and layers first.
    """
    if details:
        console.print(totals_table(report))
        console.print(layers_table(report))
    lines = [_what_ran(report), *_held_out(report), _comparison(report)]
    lines += _balance(report) if report["devices"] > 1 else []
    lines += _forecasts(report) if report["forecasts"]["by"] != "none" else []
    lines += _caching(report) if report["cache"] else []
    lines.append(Text(f"Pictures: {report['out']}/report.html; all figures: report.json beside it"))
    title = Text(f"{report['model']} with Switchcast", style="bold")
    console.print(Panel(Text("\n").join(lines), title=title, title_align="left", expand=False))
    for number, (command, why) in enumerate(_commands(report)):  # outside the frame, so that they can be copied
        start = "next" if number == 0 else "    "
        line = f"{start}  [bold]{escape(typed(command))}[/bold]  [dim]# {why}[/dim]"
        console.print(line, soft_wrap=True, highlight=False)


def _what_ran(report: dict[str, Any]) -> Text:
    emulated = " emulated" if report["processes"] == 1 and report["devices"] > 1 else ""
    devices = f"{report['devices']}{emulated} device{'s' if report['devices'] > 1 else ''}"
    slots = f", {report['redundant']} replica slots a layer" if report["redundant"] else ""
    return Text(f"{report['batches']} batches, {report['tokens']:,} tokens on {devices}{slots}")


def _held_out(report: dict[str, Any]) -> list[Text]:
    """Whether the forecasts are judged on text that the predictor was not trained on, where that needs saying."""
    labels = {True: "Held-out text", False: "Not held out", None: "Not known to be held out"}
    style, note = "" if report["held_out"] else "yellow", report["held_out_note"]
    return [Text(f"{labels[report['held_out']]}: {note}", style)] if note else []


def _comparison(report: dict[str, Any]) -> Text:
    difference, same = report["max_logit_difference"], report["same_argmax"]
    if same is None:
        return Text("Outputs were not compared with the plain model's (--check false)")
    if report["dtype"] == "float32":
        equal, near = same == 1 and difference <= EQUAL, ""
        share = "100 %" if same == 1 else f"{100 * same:.3f} %"
        found = f" (logits to {difference:.1e}, likeliest tokens {share})"
    else:
        flipped, routes, tokens = report["flipped_routes"], report["routes"], report["differing_tokens"]
        equal, near = flipped <= ROUNDED * routes and same >= 1 - ROUNDED, f" up to {report['dtype']} rounding"
        found = f"\n({flipped:,} of {routes:,} routes and {tokens:,} likeliest tokens differ)"
    text = f"Outputs {'equal' if equal else 'differ from'} the plain model's{near if equal else ''}"
    return Text.assemble((text, "bold green" if equal else "bold red"), found)


def _balance(report: dict[str, Any]) -> list[Text]:
    held_out = "held-out " if report["held_out"] else ""
    over = f"{report['batches']} {held_out}batch{'es' if report['batches'] > 1 else ''}"
    lines = [Text(f"Balancedness, mean of {over} (mean device load / largest, 1 is perfect):")]
    labels = POLICIES | {"replicated": f"{report['forecasts']['by']} (this run)"}
    width = max(map(len, labels.values()))
    for name, label in labels.items():
        value = report["balancedness"][name]
        bar = "█" * round(BAR * value)
        lines.append(Text(f"  {label:<{width}} {value:.3f} {bar}", style=COLOURS.get(name, "")))
    return lines


def _forecasts(report: dict[str, Any]) -> list[Text]:
    health = report["forecasts"]
    colour = "bold red" if health["replaced"] else "yellow" if health["late"] > health["used"] else ""
    counts = ", ".join(f"{health[name]} {name}" for name in ("used", "late", "replaced"))
    return [Text.assemble(f"Forecasts ({health['by']}): ", (counts, colour))]


def _caching(report: dict[str, Any]) -> list[Text]:
    tier = report["cache"]["device"]
    ahead, read = tier["prefetch_bytes"], tier["demand_bytes"] + tier["prefetch_bytes"]
    return [
        Text(f"Experts resident when requested: {tier['hit_rate']:.1%}; waited for experts: {tier['stall_ms']:.0f} ms"),
        Text(f"Bytes read: {read / 1e6:.1f} MB, of that ahead of need {ahead / max(read, 1):.1%}"),
    ]


def _commands(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What to type next, for the model and the predictor of this run, and what it does."""
    if report["predictor"] is None:
        trained = "train.py"
        if report["model"] != BUNDLED:
            name = Path(report["model"]).name
            at = f" --data.revision {report['revision']}" if report["revision"] else ""
            trained += f" --data.model {report['model']}{at} --data.trace outputs/traces/{name}"
            trained += f" --predictor outputs/{name}"
        folder = trained.rpartition("--predictor ")[2] if "--predictor" in trained else "outputs/predictor"
        return [(f"python {trained}", f"trains a predictor; then run this again with --predictor {folder}")]
    model = "" if report["model"] == BUNDLED else f" --model {report['model']}"
    model += f" --revision {report['revision']}" if report["revision"] else ""
    command = f"-m runtime.infer{model} --predictor {report['predictor']}"
    shown = [(f"python -m predictor.show {report['predictor']}", "how good the forecasts are")]
    if report["processes"] == 1:
        shown.append((f"torchrun --nproc-per-node 2 {command}", "two processes"))
    if report["cache"] is None:
        half = max(round(report["expert_mib"] / 2), 1)
        shown.append((f"python {command} --device-memory {half}MiB", "half the experts in memory"))
    return shown


def totals_table(report: dict[str, Any]) -> Table:
    """Forecast error, moves, memory, caches and median milliseconds."""
    table = Table(title="Whole run", title_justify="left", show_header=False)
    rows = {"forecast error (total variation)": _or_dash(report["load_tv"], ".3f")}
    if report["redundant"]:
        moved = f", {report['bytes'] / 1e6:.1f} MB" if report["cache"] is None else ", read by the caches"
        rows["replicas moved"] = f"{report['moves']}{moved}, {report['forecasts']['late']} times late"
    if report["processes"] > 1:
        rows["tokens sent to another process"] = f"{report['sent_share']:.1%}"
    rows["peak memory of each process, GiB"] = ", ".join(f"{peak:.2f}" for peak in report["peak_gib"])
    if report["cache"] is not None:
        tier = report["cache"]["device"]
        rows["experts resident when requested"] = f"{tier['hit_rate']:.1%}"
        rows["prefetched experts that were used"] = f"{tier['prefetch_precision']:.1%}"
        read = tier["demand_bytes"] + tier["prefetch_bytes"]
        rows["bytes read; share read ahead"] = f"{read / 1e6:.1f} MB; {tier['prefetch_bytes'] / max(read, 1):.1%}"
        rows["time waited for experts"] = f"{tier['stall_ms']:.0f} ms"
    rows |= {f"median ms: {name.replace('_', ' ')}": _or_dash(ms, ".1f") for name, ms in report["ms"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def layers_table(report: dict[str, Any]) -> Table:
    """One row per MoE layer."""
    table = Table("layer", title="Layer by layer", title_justify="left")
    for column in ("batches", "balancedness", "busiest device, ms", "waited, ms", "sent", "moves"):
        table.add_column(column, justify="right")
    for row in report["layers"]:
        *figures, sent, moves = (
            row[name] for name in ("balancedness", "busy_max_ms", "waited_ms", "sent_share", "moves")
        )
        table.add_row(
            row["layer"],
            str(row["batches"]),
            *(_or_dash(figure, ".3f") for figure in figures),
            f"{sent:.1%}",
            str(moves),
        )
    return table


def _or_dash(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
