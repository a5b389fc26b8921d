"""Runs a Switch model over text, experts replicated ahead of every batch, and checks every answer.

Run it with `python -m runtime.infer --predictor outputs/predictor`, or one process for each device with
`torchrun --nproc-per-node 2 -m runtime.infer --predictor outputs/predictor`; the last line of stdout is one JSON
document.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.cli import from_command_line, user_errors
from data.files import whole_file, write_json
from data.phases import corpus_splits, open_traffic
from data.switch import load_switch
from data.tracer import model_inputs
from data.traffic import Traffic
from data.weights import BUNDLED
from runtime.batch import BatchCost, ModelBatch
from runtime.check import BatchCheck, Checker
from runtime.engine import Engine
from runtime.peers import PeerLostError, Peers
from runtime.telemetry import Telemetry, over_batches


def text_batches(engine: Engine, text: str | None, traffic: Traffic, count: int) -> Iterator[ModelBatch]:
    """Batches of the user's text; by default the offline corpus' held-out ones from where the topic always changes."""
    stream = open_traffic(text, engine.switch.tokenizer, "teacher", traffic)
    if text is None:
        splits = corpus_splits(traffic)
        stream = (batch for batch in stream if splits[batch.number] == "test" and batch.phase in ("every_1", "unseen"))
    for batch in islice(stream, count):
        yield ModelBatch(*model_inputs(batch, engine.switch.model.config))


def summarise(checks: list[BatchCheck], costs: list[BatchCost], engine: Engine) -> dict[str, Any]:
    """The JSON document: sums over batches, means of balancedness and error, medians of milliseconds."""
    ready = [cost.preparation for cost in costs if cost.preparation]
    errors = [check.load_tv for check in checks if check.load_tv is not None]
    differences = [check.logit_difference for check in checks if check.logit_difference is not None]
    alike = [check.same_argmax * check.tokens for check in checks if check.same_argmax is not None]
    tokens = sum(check.tokens for check in checks)
    names = ("contiguous", "replicated", "oracle")
    return {
        "model": engine.switch.layout.model_id,
        "processes": engine.peers.world,
        "devices": engine.home.num_devices,
        "redundant": engine.home.num_redundant,
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
        "peak_gib": [round(peak, 3) for peak in engine.peak_gib()],
        "ms": {
            "forecast": median(item.forecast_ms for item in ready) if ready else None,
            "plan": median(item.plan_ms for item in ready) if ready else None,
            "move": median(item.move_ms for item in ready) if ready else None,
            "compute": median(cost.compute_ms for cost in costs),
            "slowest_device": median(float(cost.busy_ms.max(-1).sum()) for cost in costs),
            "waited": median(float(cost.waited_ms.max(-1).sum()) for cost in costs),
            "held_up": median(cost.held_up_ms for cost in costs),
        },
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
        f"balancedness on {report['devices']} devices, no replicas": f"{balance['contiguous']:.3f}",
        f"  with {report['redundant']} replica slots a layer": f"{balance['replicated']:.3f}",
        "  with the oracle's forecast": f"{balance['oracle']:.3f}",
        "forecast error (total variation)": _or_dash(report["load_tv"], ".3f"),
        "experts moved": f"{report['moves']} ({report['bytes'] / 1e6:.1f} MB), {report['late']} times late",
    }
    if report["processes"] > 1:
        rows["tokens sent to another process"] = f"{report['sent_share']:.1%}"
    rows["peak memory of each process, GiB"] = ", ".join(f"{peak:.2f}" for peak in report["peak_gib"])
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


def infer(
    model: str = BUNDLED,
    predictor: Path | None = None,
    text: str | None = None,
    devices: int | None = None,
    redundant: int = 16,
    batches: int = 24,
    traffic: Traffic = Traffic(),
    check: bool = True,
    timeout: float = 60.0,
    metrics_port: int | None = None,
    metrics_file: Path | None = None,
    wandb: bool | str = False,
    out: Path = Path("outputs/infer"),
) -> dict[str, Any]:
    """Runs a model over text with its experts replicated over devices, and compares with the plain model.

    Args:
        model: 'switch-mini-64' (bundled), a local folder, or a hub id.
        predictor: Folder that `train.py` wrote; without one nothing is forecast and nothing replicated.
        text: File, folder or hub data set; by default the offline corpus' held-out batches.
        devices: Devices that the experts are spread over; under torchrun the number of processes, else 8, run and timed
            one after the other.
        redundant: Replica slots of each MoE layer over all devices.
        batches: Most batches to run.
        traffic: How text is cut into batches.
        check: Whether answers are compared with the plain model's, which every process then holds as well.
        timeout: Seconds after which a process that does not answer counts as lost.
        metrics_port: Port to serve Prometheus metrics on while it runs, at /metrics; 0 takes any free one.
        metrics_file: File to append one JSON line to after every batch.
        wandb: Whether to log every batch to Weights & Biases, or the project to log it to.
        out: Folder for report.json and balancedness.png.

    Raises:
        ValueError: On anything that cannot be used; the message says what to do.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; at least 1 is needed")
    settings = {"model": model, "predictor": str(predictor), "text": text, "devices": devices, "redundant": redundant}
    first = Peers().rank == 0  # it alone serves and writes
    sinks = (metrics_port, metrics_file, wandb) if first else (None, None, False)
    with Telemetry(*sinks, out, settings) as telemetry:
        engine = Engine.from_pretrained(model, predictor, devices, redundant, timeout_s=timeout)
        plain = load_switch(model).model.to(engine.peers.device) if check else None
        with engine:
            checks, costs = run(engine, plain, text_batches(engine, text, traffic, batches), batches, telemetry)
            report = summarise(checks, costs, engine)
    if first:
        write_json(out / "report.json", report | {"each_batch": [asdict(check) for check in checks]})
        plot(checks, out / "balancedness.png")
    return report


def run(
    engine: Engine, plain: Any, stream: Iterator[ModelBatch], most: int, telemetry: Telemetry
) -> tuple[list[BatchCheck], list[BatchCost]]:
    """Runs and checks every batch.

    Raises:
        ValueError: If there is none.
        PeerLostError: If another process is gone.
    """
    checks: list[BatchCheck] = []
    costs: list[BatchCost] = []
    queue: list[ModelBatch] = []
    checker, layers, controller = Checker(engine, plain), engine.switch.layout.layer_names, engine.controller
    console = Console(stderr=True, quiet=engine.peers.rank > 0)
    if telemetry.port is not None:
        console.print(f"metrics: http://localhost:{telemetry.port}/metrics")

    def noted() -> Iterator[ModelBatch]:
        for batch in stream:
            queue.append(batch)
            yield batch

    for output in track(engine.run(noted()), "inference", total=most, console=console):
        with engine.peers.watched():
            checks.append(checker.check(queue.pop(0), output))
        costs.append(output.cost)
        telemetry.record(layers, output.cost, controller.late, controller.fallbacks)
    if not checks:
        raise ValueError("the text gave no batch; expected at least one usable line")
    return checks, costs


def main() -> None:
    """Command line of `infer`: a table, then one JSON document. `--metrics-port` and `--metrics_port` are one."""
    words = [word.partition("=") if word.startswith("--") else ("", "", word) for word in sys.argv[1:]]
    sys.argv[1:] = ["--" * bool(name) + name[2:].replace("-", "_") + equals + value for name, equals, value in words]
    with user_errors():
        try:
            report = from_command_line(infer)
        except PeerLostError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if Peers().rank == 0:
            show(report, Console())
            print(json.dumps(report))


if __name__ == "__main__":
    main()
