"""Every policy on every drift workload: balancedness, moves a layer and step, and the verdict.

    python -m benchmarks.drift

8 devices, 16 redundant experts, steps planned from the second on. Prints a table and, as the last line, one JSON
document. The verdict is for a device that computes 100,000 tokens a second with an expert of 9.4 MB over a link of
25 GB/s, reading one more expert being worth no tokens, so that it does not depend on this machine.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.simulate.comparison import parse, simulate
from runtime.simulate.workloads import WORKLOADS

POLICIES = (
    ("none", "contiguous", "even"),
    ("last", "eplb", "even"),
    ("last", "eplb", "quota"),
    ("last", "home", "quota"),
    ("mean", "home", "quota"),
    ("ema", "home", "quota"),
    ("oracle", "home", "quota"),
)
HARDWARE = ["--tokens-per-second", "1e5", "--link-bytes-per-second", "25e9", "--expert-overhead-tokens", "0"]


def main() -> None:
    """Simulates all workloads."""
    table = Table(title="Balancedness (moves a layer and step): 8 devices, 16 redundant experts")
    table.add_column("workload")
    for policy in POLICIES:
        table.add_column("\n".join(policy), justify="right")
    table.add_column("verdict")
    reports = {}
    with TemporaryDirectory() as folder:
        for name, make in WORKLOADS.items():
            path = Path(folder) / f"{name}.npz"
            np.savez(path, counts=make(np.random.default_rng(0)))
            report = simulate(parse([str(path), "--out", folder, *HARDWARE]), Console(stderr=True))
            found = {(item["forecast"], item["planner"], item["split"]): item for item in report["results"]}
            cells = [f"{found[p]['balancedness']:.3f} ({found[p]['moves_per_layer']:.1f})" for p in POLICIES]
            answer = report["verdict"]
            table.add_row(name, *cells, f"{answer['answer']}, {answer['net_gain']:.0%}")
            reports[name] = report | {"loads": name}
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
