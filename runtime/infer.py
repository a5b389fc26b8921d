"""Runs a Switch model over text, experts replicated ahead of every batch, and checks every answer.

Run it with `python -m runtime.infer --predictor outputs/predictor`; the last line of stdout is one JSON document.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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
from data.trace import IntArray
from data.tracer import model_inputs
from data.traffic import Traffic
from data.weights import BUNDLED
from predictor.forecast import forecast_from_load
from runtime.balance import balancedness, split_load
from runtime.engine import BatchCost, BatchOutput, Engine, ModelBatch
from runtime.plan import ReplicationPlan


@dataclass(frozen=True)
class BatchCheck:
    """One batch beside the plain model and the oracle.

    Attributes:
        tokens: Real tokens, decoder included.
        logit_difference: Largest absolute difference from the plain model's logits on real tokens.
        same_argmax: Share of real tokens whose likeliest output token is the plain model's.
        contiguous: Balancedness without replicas, experts in their own order.
        replicated: Balancedness as it ran.
        oracle: Balancedness of the same planner, given the true load.
        load_tv: Total variation distance of the forecast; None where there was no forecast.
    """

    tokens: int
    logit_difference: float
    same_argmax: float
    contiguous: float
    replicated: float
    oracle: float
    load_tv: float | None


@dataclass
class Checker:
    """Compares outputs with the plain model's and keeps the oracle's plan from batch to batch."""

    engine: Engine
    plan: ReplicationPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = self.engine.home

    def check(self, batch: ModelBatch, output: BatchOutput) -> BatchCheck:
        """Runs the plain model on the same batch; see `BatchCheck`."""
        plain = self.engine.plain_forward(batch)
        real = (batch.decoder or batch.tokens).mask.to(plain.device)
        ours, theirs = output.logits[real], plain[real]
        truth = forecast_from_load(output.cost.load.astype(np.float64), made_at=0, source="oracle")
        self.plan = self.engine.planner.plan(truth, self.plan, self.engine.controller.history)
        return BatchCheck(
            tokens=batch.tokens.num_tokens + (batch.decoder.num_tokens if batch.decoder else 0),
            logit_difference=float((ours - theirs).abs().max()),
            same_argmax=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
            contiguous=_mean_balance(split_load(output.cost.load, self.engine.home)),
            replicated=_mean_balance(output.cost.device_load),
            oracle=_mean_balance(split_load(output.cost.load, self.plan)),
            load_tv=_forecast_error(output.cost),
        )


def _mean_balance(device_load_LG: IntArray) -> float:
    return float(balancedness(device_load_LG).mean())


def _forecast_error(cost: BatchCost) -> float | None:
    forecast = cost.preparation.forecast if cost.preparation else None
    if forecast is None:
        return None
    truth = forecast_from_load(cost.load.astype(np.float64), made_at=0, source="truth")
    return float(np.abs(forecast.share - truth.share).sum(-1).mean() / 2)


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
    names = ("contiguous", "replicated", "oracle")
    return {
        "model": engine.switch.layout.model_id,
        "devices": engine.home.num_devices,
        "redundant": engine.home.num_redundant,
        "batches": len(checks),
        "tokens": sum(check.tokens for check in checks),
        "max_logit_difference": max(check.logit_difference for check in checks),
        "same_argmax": float(np.average([c.same_argmax for c in checks], weights=[c.tokens for c in checks])),
        "balancedness": {name: float(np.mean([getattr(check, name) for check in checks])) for name in names},
        "load_tv": float(np.mean(errors)) if errors else None,
        "moves": sum(item.moves for item in ready),
        "bytes": sum(item.nbytes for item in ready),
        "late": engine.controller.late,
        "fallbacks": sum(engine.controller.fallbacks.values()),
        "ms": {
            "forecast": median(item.forecast_ms for item in ready) if ready else None,
            "plan": median(item.plan_ms for item in ready) if ready else None,
            "move": median(item.move_ms for item in ready) if ready else None,
            "compute": median(cost.compute_ms for cost in costs),
            "slowest_device": median(float(cost.busy_ms.max(-1).sum()) for cost in costs),
        },
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table for people."""
    table = Table(
        title=f"{report['model']}: {report['batches']} batches, {report['tokens']:,} tokens", show_header=False
    )
    balance = report["balancedness"]
    rows = {
        "largest logit difference to the plain model": f"{report['max_logit_difference']:.1e}",
        "same likeliest token": f"{report['same_argmax']:.2%}",
        f"balancedness on {report['devices']} devices, no replicas": f"{balance['contiguous']:.3f}",
        f"  with {report['redundant']} replica slots a layer": f"{balance['replicated']:.3f}",
        "  with the oracle's forecast": f"{balance['oracle']:.3f}",
        "forecast error (total variation)": "no forecast" if report["load_tv"] is None else f"{report['load_tv']:.3f}",
        "experts moved": f"{report['moves']} ({report['bytes'] / 1e6:.1f} MB), {report['late']} times late",
    }
    rows |= {f"median ms: {name}": "-" if ms is None else f"{ms:.1f}" for name, ms in report["ms"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


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
    devices: int = 8,
    redundant: int = 16,
    batches: int = 24,
    traffic: Traffic = Traffic(),
    out: Path = Path("outputs/infer"),
) -> dict[str, Any]:
    """Runs a model over text with its experts replicated over emulated devices, and compares with the plain model.

    Args:
        model: 'switch-mini-64' (bundled), a local folder, or a hub id.
        predictor: Folder that `train.py` wrote; without one nothing is forecast and nothing replicated.
        text: File, folder or hub data set; by default the offline corpus' held-out batches.
        devices: Devices that the experts are spread over, run and timed one after the other.
        redundant: Replica slots of each MoE layer over all devices.
        batches: Most batches to run.
        traffic: How text is cut into batches.
        out: Folder for report.json and balancedness.png.

    Raises:
        ValueError: On anything that cannot be used; the message says what to do.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; at least 1 is needed")
    console = Console(stderr=True)
    checks: list[BatchCheck] = []
    costs: list[BatchCost] = []
    queue: list[ModelBatch] = []
    with Engine.from_pretrained(model, predictor, devices, redundant) as engine:
        checker = Checker(engine)
        stream = text_batches(engine, text, traffic, batches)

        def noted() -> Iterator[ModelBatch]:
            for batch in stream:
                queue.append(batch)
                yield batch

        for output in track(engine.run(noted()), "inference", total=batches, console=console):
            checks.append(checker.check(queue.pop(0), output))
            costs.append(output.cost)
        if not checks:
            raise ValueError("the text gave no batch; expected at least one usable line")
        report = summarise(checks, costs, engine)
    write_json(out / "report.json", report | {"each_batch": [asdict(check) for check in checks]})
    plot(checks, out / "balancedness.png")
    return report


def main() -> None:
    """Command line of `infer`: a table, then one JSON document."""
    with user_errors():
        report = from_command_line(infer)
        show(report, Console())
        print(json.dumps(report))


if __name__ == "__main__":
    main()
