"""A recording that does not fit memory: how much memory and time the simulator needs for it.

    python -m benchmarks.long_recording                     # a million steps of 58 x 256: 119 GB of loads
    python -m benchmarks.long_recording --steps 20000

Writes a trace of counts whose loads move on from shard to shard, then simulates its last `--planned` steps without
replicas and with one policy, in a process of its own, which reads the whole trace four times. Prints the bytes of the
loads, the bytes of the trace on disk, the largest memory of that process, and the seconds; in a pipe, the last line is
JSON.
"""

import argparse
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.cli import print_json
from data.models.layout import MoELayout
from data.traces.store import write_about, write_counts_shard
from runtime.simulate.comparison import compare_policies
from runtime.simulate.cost_model import Hardware

LAYERS, EXPERTS, TOKENS, SHARD = 58, 256, 32768, 256
"""DeepSeek-V3's MoE layers and experts, 4,096 tokens of 8 experts each, and the steps of a shard."""
HARDWARE = Hardware(4.4e7, tokens_per_second=1e6, bytes_per_second=50e9, expert_overhead_tokens=20)


def write_trace(folder: Path, steps: int) -> int:
    """Writes the trace; returns the bytes of its files. Every shard holds the same loads for other experts."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, EXPERTS + 1) ** 0.7
    shares = rng.permuted(np.tile(share / share.sum(), (LAYERS, 1)), axis=1)
    block = np.stack([rng.multinomial(TOKENS, shares) for _ in range(SHARD)]).astype(np.int64)
    layout = MoELayout(
        "long", "", tuple(("decoder", layer) for layer in range(LAYERS)), EXPERTS, 0, d_model=0, d_ff=0, vocab_size=0
    )
    starts = track(range(0, steps, SHARD), "writing", console=Console(stderr=True))
    shards = [
        write_counts_shard(
            folder / f"part-{first}.parquet", first, np.roll(block[: steps - first], first // SHARD, axis=-1)
        )
        for first in starts
    ]
    write_about(folder, layout, shards, ["test"] * steps, "counts")
    return sum(path.stat().st_size for path in folder.iterdir())


def simulated(folder: Path, steps: int, planned: int) -> dict[str, Any]:
    """Replays the last steps; the memory of this process and the seconds."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = compare_policies(
        folder, 32, 32, ["last"], ["home"], ["quota"], start=steps - planned, hardware=HARDWARE,
        console=Console(stderr=True),
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {name: report["results"][0][name] for name in ("balancedness", "plan_ms", "split_us")}
    return {
        "planned": report["steps"], "seconds": round(time.perf_counter() - began, 1), "peak_mib": peak >> 10,
        "grown_mib": (peak - before) >> 10, "answer": report["verdict"]["answer"],
    } | found  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the recording")
    parser.add_argument("--planned", type=int, default=100, help="how many of its last steps are planned")
    given = parser.parse_args()
    if not 1 <= given.planned < given.steps:
        parser.error(f"--planned is {given.planned}, expected 1 to {given.steps - 1}: --steps is {given.steps}")
    with tempfile.TemporaryDirectory() as name:
        began, folder = time.perf_counter(), Path(name)
        on_disk = write_trace(folder, given.steps)
        written = round(time.perf_counter() - began, 1)
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            found = apart.submit(simulated, folder, given.steps, given.planned).result()
    loads = given.steps * LAYERS * EXPERTS * 8
    report = {"steps": given.steps, "loads_bytes": loads, "trace_bytes": on_disk, "write_seconds": written} | found
    table = Table(title=f"{given.steps:,} steps of {LAYERS} x {EXPERTS}: {loads / 1e9:.1f} GB of loads")
    for column in ("trace on disk", "memory", "time"):
        table.add_column(column)
    table.add_row(
        f"{on_disk / 1e9:.2f} GB",
        f"{found['peak_mib']:,} MiB, {found['grown_mib']:,} more than at its start",
        f"{found['seconds']:,} s, {found['planned']:,} steps planned",
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print_json(report)


if __name__ == "__main__":
    main()
