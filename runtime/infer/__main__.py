"""Runs a model over text, experts replicated ahead of every batch, and checks every answer.

Run it with `python -m runtime.infer --predictor outputs/predictor`, or one process for each device with
`torchrun --nproc-per-node 2 -m runtime.infer --predictor outputs/predictor`; in a pipe, the last line of stdout is one
JSON document.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from data.arrays import IntArray
from data.cli import from_command_line, print_json, user_errors
from data.files import check_folder, write_json
from data.models.device import Device
from data.models.model import Dtype, load_model
from data.models.weights import BUNDLED
from data.progress import track
from data.text.batching import BatchingConfig
from data.text.source import open_text
from predictor.choice import Choice
from runtime.distributed.heartbeat import RankLostError, exit_now
from runtime.distributed.ranks import Ranks
from runtime.engine.batch import BatchStats, ModelBatch
from runtime.engine.engine import Engine
from runtime.infer.dry_run import size_up
from runtime.infer.page import write_run
from runtime.infer.report import fallback_warning, show, summarise
from runtime.infer.text import held_out, text_batches
from runtime.infer.verify import BatchCheck, Verifier
from runtime.telemetry.recorder import Telemetry


def infer(
    model: str = BUNDLED,
    predictor: Path | None = None,
    forecast: Choice = "auto",
    text: str | None = None,
    text_column: str | None = None,
    devices: int | None = None,
    redundant: int | None = None,
    max_moves: int | None = None,
    devices_per_node: int | None = None,
    groups: int | None = None,
    expert_overhead_tokens: int | Literal["auto"] = 0,
    batches: int = 24,
    batching: BatchingConfig = BatchingConfig(),
    check: bool = True,
    allow_fallback: bool = False,
    device: Device | None = None,
    dtype: Dtype | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    timeout: float = 60.0,
    metrics_port: int | None = None,
    metrics_file: Path | None = None,
    wandb: bool | str = False,
    out: Path = Path("outputs/infer"),
    details: bool = False,
    dry_run: bool = False,
    revision: str = "",
) -> dict[str, Any]:
    """Runs a model over text with its experts replicated over devices, and compares with the plain model.

    Args:
        model: 'switch-mini-64' or 'qwen3-mini-64' (bundled), a local folder, or a hub id.
        predictor: Folder that `train.py` wrote.
        forecast: What forecasts: 'adaptive' the predictor, which goes on learning; 'learned' the predictor as it was
            trained; 'last' the last batch, 'ema' a moving average; 'none' nothing, and nothing is replicated. 'auto' is
            'adaptive', or one of the two from past loads where that did better on the validation batches; without a
            predictor it is 'none'.
        text: File, folder or hub data set, from behind the documents that the predictor was trained on; by default the
            offline corpus' held-out batches.
        text_column: Column of text in .csv, .json, .jsonl, .parquet and hub data sets; "text" by default.
        devices: Devices that the experts are spread over; under torchrun the number of processes, else 8, run and timed
            one after the other.
        redundant: Replica slots of each MoE layer over all devices: 16, or 0 on one device, unless given.
        max_moves: Most experts copied before one batch, over all layers; no limit by default.
        devices_per_node: Devices that share a fast network, for copies and tokens to stay within; one node by default.
        groups: Groups of consecutive experts that stay on one node, copies included, as group-limited routing wants it;
            none by default.
        expert_overhead_tokens: Tokens a device computes in the time it takes to read one more expert's weights, which
            planner and split then count; 'auto' measures it at the start (0 with --device-memory).
        batches: Most batches to run.
        batching: How text is cut into batches.
        check: Whether outputs are compared with the plain model's, which every process then holds as well.
        allow_fallback: Whether the exit code is 0 even if forecasts were replaced; by default it is then 1.
        device: Where the model runs: CUDA where there is a device for this process, else the CPU.
        dtype: Data type of the weights: on a CPU float32 by default. In bfloat16 outputs may differ from the plain
            model's where its routers are nearly undecided; what differs is counted.
        device_memory: Bytes that experts may take where they are computed, such as 2GiB; the others are fetched ahead.
        host_memory: Bytes of host memory below that, where computing is done on an accelerator.
        timeout: Seconds after which a process that does not respond counts as lost.
        metrics_port: Port to serve Prometheus metrics on while it runs, at /metrics; 0 takes any free one.
        metrics_file: File to append one JSON line to after every batch.
        wandb: Whether to log every batch to Weights & Biases, or the project to log it to.
        out: Folder for report.html, its pictures and report.json.
        details: Whether tables by layer and median times are printed as well.
        dry_run: Whether only sizes are printed: parameters, bytes of a device, and what a budget holds. Needs no
            weights, only the model's config.json.
        revision: Revision of a hub model.

    Raises:
        ValueError: On anything that cannot be used; the message says what to do.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; at least 1 is needed")
    if dry_run:
        kind = dtype or ("bfloat16" if device == "cuda" else "float32")
        return size_up(model, revision, predictor, kind, devices, redundant, device_memory, host_memory)
    settings = {"model": model, "predictor": str(predictor), "text": text, "devices": devices, "redundant": redundant}
    first = Ranks(timeout, device).rank == 0  # only this rank exports and writes
    check_folder(out)
    source = open_text(text, text_column)
    digest = "none" if source is None else source.digest
    exporters = (metrics_port, metrics_file, wandb) if first else (None, None, False)
    with Telemetry(*exporters, out, settings) as telemetry:
        engine = Engine(
            model, predictor, devices, redundant, forecast=forecast, max_moves=max_moves,
            devices_per_node=devices_per_node, num_groups=groups, expert_overhead_tokens=expert_overhead_tokens,
            device_memory=device_memory, host_memory=host_memory, device=device, dtype=dtype, measure=True,
            timeout_s=timeout, revision=revision,
            must_agree={"text": digest, "batches": str(batches), "batching": str(batching), "check": str(check)},
        )  # fmt: skip
        plain = plain_model(model, revision, engine) if check else None
        held = held_out(predictor, source, batching)
        with engine:
            stream = text_batches(engine, source, batching, batches, held.skip)
            checks, stats, copies = run(engine, plain, stream, batches, telemetry)
            with engine.ranks.watched():
                report = summarise(checks, stats, engine)
    report |= {"held_out": held.known, "held_out_note": held.note}
    if first:
        write_run(out, report, checks, stats, copies)
        write_json(out / "report.json", report | {"each_batch": [asdict(check) for check in checks]})
    report |= {"out": str(out), "predictor": predictor and str(predictor), "allow_fallback": allow_fallback}
    if first:
        if source is not None:
            Console(stderr=True).print(source.table())
        show(report, Console(), details)
    return report


def plain_model(name: str, revision: str, engine: Engine) -> Any:
    """The unmodified model in the engine's dtype, on its device."""
    dtype: Any = str(engine.loaded.model.dtype).removeprefix("torch.")
    return load_model(name, revision, dtype).model.to(engine.ranks.device)


def run(
    engine: Engine, plain: Any, stream: Iterator[tuple[str, ModelBatch]], most: int, telemetry: Telemetry
) -> tuple[list[BatchCheck], list[BatchStats], list[IntArray]]:
    """Runs and verifies every batch.

    Returns:
        Of each batch: its comparison, what it took, and the copies of each expert while it ran, `[L, E]`.

    Raises:
        RankLostError: If another process is gone.
    """
    checks: list[BatchCheck] = []
    stats: list[BatchStats] = []
    copies: list[IntArray] = []
    queue: list[tuple[str, ModelBatch]] = []
    verifier, layers, controller = Verifier(engine, plain), engine.loaded.layout.layer_names, engine.controller
    console = Console(stderr=True, quiet=engine.ranks.rank > 0)
    if telemetry.port is not None:
        console.print(f"metrics: http://localhost:{telemetry.port}/metrics")

    def queued() -> Iterator[ModelBatch]:
        for phase, batch in stream:
            queue.append((phase, batch))
            yield batch

    with verifier:
        for output in track(engine.run(queued()), "inference", most, console):
            with engine.ranks.watched():
                phase, batch = queue.pop(0)
                checks.append(verifier.check(batch, output, phase))
            stats.append(output.stats)
            copies.append(controller.transfer.plan.replica_count)
            telemetry.record(layers, output.stats, controller.late, controller.fallbacks)
    return checks, stats, copies


def main() -> None:
    """Command line of `infer`: the result in a frame, then one JSON document.

    The exit code is 1 if forecasts were replaced, unless `--allow-fallback` is given.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if Ranks().rank > 0:  # all ranks choose the same forecaster, and rank 0 says so
        logging.getLogger("predictor.choice").setLevel(logging.ERROR)
    try:
        with user_errors():
            report = from_command_line(infer)
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_now(1)
    except SystemExit as stop:
        if Ranks().world > 1:
            exit_now(stop.code if isinstance(stop.code, int) else 1)
        raise
    if Ranks().rank == 0:
        print_json(report)
        if "forecasts" not in report:  # a dry run
            return
        if warning := fallback_warning(report):
            print(f"{'warning' if report['allow_fallback'] else 'error'}: {warning}", file=sys.stderr)
            if not report["allow_fallback"]:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
