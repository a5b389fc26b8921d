"""Soak: many small batches through one engine that stays open, and whether memory, threads, files and latency stay.

    python -m stress.soak                       # 210,000 batches, about an hour
    python -m stress.soak --batches 2000        # a minute, too short for a verdict on memory

A random Switch model (8 experts in each of two layers) runs on 4 emulated devices with 8 replica slots. A predictor
forecasts every batch and learns from it; the planner fills the replica slots at random, and each batch waits for its
plan, so that experts move before every batch. One batch in ten runs the decoder, too. Every 100 batches text is
generated, with a new plan every second step. Every 1,000 batches another engine, within a memory budget, is opened,
runs some batches and is closed; a Prometheus endpoint serves all the time. One batch in 500 is compared with the plain
model.

Resident memory, threads and open files are sampled every 50 batches. The first tenth is the warm-up. Promised:

- memory: the median of the last tenth is at most 2 % above the median of the second tenth;
- threads and open files: the same number in every sample after the warm-up;
- latency: the 99th percentile of a batch's processor time in the last tenth is within three standard deviations of the
  second tenth's, where the deviation is that of the percentiles of all tenths but the first. Processor time, because
  other programs of the machine lengthen the time by the clock, which is printed as well.

Ctrl-C ends it early, with the figures so far. Prints a table and, in a pipe, one line of JSON, which is also
written to the folder `--out` with a picture.
"""

import argparse
import copy
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.machine import resident_bytes
from data.arrays import FloatArray
from data.cli import print_json
from data.files import write_json
from data.models.layout import MoELayout
from data.models.model import LoadedModel
from data.style import drawing, heading, line, panels, save
from data.traces.trace import pad_tokens
from predictor.checkpoint import load_adaptive
from runtime.balancing.balancer import compile_kernels
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from runtime.telemetry.recorder import Telemetry
from tests.conftest import small_switch, write_switch
from tests.helpers.budgets import budget
from tests.helpers.planners import RandomPlanner
from tests.helpers.predictors import untrained

DEVICES, REDUNDANT = 4, 8
DECODE, GENERATE, SAMPLE, COMPARE, REOPEN = 10, 100, 50, 500, 1000
"""Batches between two with a decoder, generations, samples, comparisons, and engines within a budget."""
TENTHS = 10
MOST_GROWTH, MOST_DEVIATIONS, MOST_DIFFERENCE = 0.02, 3.0, 1e-5


@dataclass
class Course:
    """What was seen in a run.

    Attributes:
        wall_ms: Time of each batch by the clock, `[N]`; all memory for it is taken before the first batch.
        cpu_ms: Processor time of each batch, all threads, `[N]`; likewise.
        done: Batches that have run.
        resident: Bytes of resident memory in each sample.
        threads: Threads in each sample.
        files: Open files in each sample.
        moved: Batches before which experts were moved.
        late: Preparations that were not ready when their batch began.
        texts: Generations.
        differences: Largest difference from the plain model's logits in each comparison.
        other_texts: Generations that differ from the plain model's.
    """

    wall_ms: FloatArray
    cpu_ms: FloatArray
    done: int = 0
    resident: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    moved: int = 0
    late: int = 0
    texts: int = 0
    differences: list[float] = field(default_factory=list)
    other_texts: int = 0

    def sample(self) -> None:
        """Adds the process as it is now."""
        self.resident.append(resident_bytes())
        self.threads.append(len(os.listdir("/proc/self/task")))
        self.files.append(len(os.listdir("/proc/self/fd")))


def batches(count: int, seed: int) -> Iterator[ModelBatch]:
    """Ragged batches of 1 to 4 sequences, one in ten with a decoder."""
    rng = np.random.default_rng(seed)

    def rows(size: int, longest: int) -> Any:
        return pad_tokens([rng.integers(3, 400, rng.integers(1, longest)) for _ in range(size)], pad=0)

    for number, size in enumerate(rng.integers(1, 5, count)):
        yield ModelBatch(rows(size, 24), rows(size, 8) if number % DECODE == 0 else None)


def soak(count: int, seed: int, folder: Path) -> Course:
    """Runs the batches; the folder is for the model of the engines within a budget."""
    course, switch = Course(np.full(count, -1.0), np.full(count, -1.0)), small_switch()
    loaded, plain = LoadedModel(switch, None, MoELayout.from_model(switch, "random")), copy.deepcopy(switch)
    write_switch(folder / "model")
    predictor = load_adaptive(untrained(folder / "model", folder / "predictor"))
    queue: list[ModelBatch] = []

    def queued() -> Iterator[ModelBatch]:
        for batch in batches(count, seed):
            queue.append(batch)
            yield batch

    engine = Engine(loaded, predictor, DEVICES, REDUNDANT)
    with suppress(KeyboardInterrupt), Telemetry(port=0) as telemetry, engine:
        engine.controller.planner = RandomPlanner(engine.home, seed)
        commit = engine.controller.commit
        engine.controller.commit = lambda wait=True: commit(wait=True)  # type: ignore[method-assign]
        outputs = engine.run(queued())
        for number in track(range(count), "batches", console=Console(stderr=True)):
            wall, cpu = time.perf_counter(), time.process_time()
            output = next(outputs)
            course.wall_ms[number] = 1e3 * (time.perf_counter() - wall)
            course.cpu_ms[number] = 1e3 * (time.process_time() - cpu)
            course.done = number + 1
            telemetry.record(
                loaded.layout.layer_names, output.stats, engine.controller.late, engine.controller.fallbacks
            )
            batch, done = queue.pop(0), output.stats.preparation
            course.moved += done is not None and done.moves > 0
            if number % COMPARE == 0:
                real = (batch.decoder or batch.tokens).mask
                course.differences.append(float((output.logits[real] - forward(plain, batch)[real]).abs().max()))
            if number % GENERATE == 0:
                generate(engine, plain, batch, course, compare=number % COMPARE == 0)
            if number % SAMPLE == 0:
                course.sample()
            if number % REOPEN == 0:  # after the sample, because threads of a closed engine end a moment later
                within_budget(folder / "model", seed)
            course.late = engine.controller.late
    return course


def generate(engine: Engine, plain: Any, batch: ModelBatch, course: Course, compare: bool) -> None:
    """Greedy text of a batch while plans change."""
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids = engine.generate(batch.tokens, replan_every=2, **settings)
    course.texts += 1
    if compare:
        tokens = batch.tokens
        expected = plain.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **settings)
        course.other_texts += not torch.equal(ids, expected)


def within_budget(folder: Path, seed: int) -> None:
    """Opens an engine with room for 3 of 16 experts, runs some batches and closes it."""
    with Engine(str(folder), device_memory=budget(3)) as engine:
        for _ in engine.run(batches(8, seed)):
            pass


def findings(course: Course) -> dict[str, Any]:
    """The figures, and which promises were kept."""
    resident, wall, cpu = (
        np.array_split(each, TENTHS)
        for each in (np.array(course.resident), course.wall_ms[: course.done], course.cpu_ms[: course.done])
    )
    memory = [float(np.median(part)) for part in resident]
    wall_p99, cpu_p99 = ([float(np.percentile(part, 99)) for part in parts] for parts in (wall, cpu))
    noise = float(np.std(np.log(cpu_p99[1:]), ddof=1))
    after = len(course.threads) // TENTHS
    growth, slower = memory[-1] / memory[1] - 1, cpu_p99[-1] / cpu_p99[1]
    kept = {
        "memory": growth <= MOST_GROWTH,
        "threads": len(set(course.threads[after:])) == 1,
        "open files": len(set(course.files[after:])) == 1,
        "latency": float(np.log(slower)) <= MOST_DEVIATIONS * noise * 2**0.5,
        "outputs": max(course.differences) <= MOST_DIFFERENCE and not course.other_texts,
    }
    return {
        "batches": course.done, "moved": course.moved, "late": course.late, "texts": course.texts,
        "compared": len(course.differences), "largest_difference": max(course.differences),
        "other_texts": course.other_texts, "resident_mib": [round(each / 2**20, 1) for each in memory],
        "growth": round(growth, 4), "threads": sorted(set(course.threads[after:])),
        "files": sorted(set(course.files[after:])), "cpu_ms_p99": [round(each, 2) for each in cpu_p99],
        "wall_ms_p99": [round(each, 2) for each in wall_p99],
        "cpu_ms_median": round(float(np.median(np.concatenate(cpu))), 2),
        "wall_ms_median": round(float(np.median(np.concatenate(wall))), 2), "last_over_second": round(slower, 3),
        "noise": round(noise, 3), "kept": kept,
    }  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    """Memory, and the 99th percentile of latency, in each tenth of the run."""
    titles = {
        "resident_mib": "resident memory, MiB, median",
        "cpu_ms_p99": "processor time of a batch, ms, 99th percentile",
    }
    with drawing():
        figure, axes = panels(8, 2.6, columns=2)
        for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
            values = report[name]
            axis.plot(np.arange(1, len(values) + 1), values, **line("learned"))
            axis.set(title=title, xlabel="tenth of the run", ylim=(0, 1.15 * max(values)))
        moved = f"experts moved before {report['moved']:,} of them"
        heading(figure, f"{report['batches']:,} batches through one engine", moved)
    save(figure, path)


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the promises and what was seen."""
    table = Table(
        title=f"{report['batches']:,} batches, {report['texts']:,} texts, experts moved before {report['moved']:,}"
    )
    for column in ("promise", "found", "kept"):
        table.add_column(column)
    found = {
        "memory": f"{report['resident_mib'][1]} to {report['resident_mib'][-1]} MiB, {report['growth']:+.2%}",
        "threads": str(report["threads"]), "open files": str(report["files"]),
        "latency": f"x {report['last_over_second']}, noise {report['noise']}; p99 {report['cpu_ms_p99'][-1]} ms",
        "outputs": f"{report['largest_difference']:.1e} at most, {report['other_texts']} other texts",
    }  # fmt: skip
    for promise, kept in report["kept"].items():
        table.add_row(promise, found[promise], "yes" if kept else "NO")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=210_000, help="batches to run; 500 at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/soak"), help="folder for soak.json and soak.png")
    given = parser.parse_args()
    if given.batches < TENTHS * SAMPLE:
        parser.error(f"--batches is {given.batches}, expected {TENTHS * SAMPLE} or more")
    torch.set_num_threads(1)
    compile_kernels()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        course = soak(given.batches, given.seed, Path(folder))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report = {"seed": given.seed, "seconds": round(time.perf_counter() - began)} | findings(course) | versions
    write_json(given.out / "soak.json", report)
    plot(report, given.out / "soak.png")
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    print_json(report)
    sys.exit(not all(report["kept"].values()))


if __name__ == "__main__":
    main()
