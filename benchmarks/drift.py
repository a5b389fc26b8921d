"""Every policy on every drift workload: balancedness, moves a layer and step, and the verdict.

    python -m benchmarks.drift

8 devices, 16 redundant experts, planned from the second step on. Prints a table and, in a pipe, one line of JSON.
The verdict assumes a device of 100,000 tokens a second, experts of 9.4 MB, a link of 25 GB/s and no overhead for one
more active expert, so that it does not depend on this machine.
"""

import sys

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.cli import print_json
from runtime.simulate.comparison import SWITCH_BASE_EXPERT, compare_policies
from runtime.simulate.cost_model import Hardware
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
HARDWARE = Hardware(SWITCH_BASE_EXPERT, tokens_per_second=1e5, bytes_per_second=25e9, expert_overhead_tokens=0)


def main() -> None:
    """Simulates all workloads."""
    table = Table(title="Balancedness (moves a layer and step): 8 devices, 16 redundant experts")
    table.add_column("workload")
    for policy in POLICIES:
        table.add_column("\n".join(policy), justify="right")
    table.add_column("verdict")
    reports = {}
    for name in track(WORKLOADS, "workloads", console=Console(stderr=True)):
        report = compare_policies(WORKLOADS[name](np.random.default_rng(0)), hardware=HARDWARE)
        found = {(item["forecast"], item["planner"], item["split"]): item for item in report["results"]}
        cells = [f"{found[p]['balancedness']:.3f} ({found[p]['moves_per_layer']:.1f})" for p in POLICIES]
        answer = report["verdict"]
        table.add_row(name, *cells, f"{answer['answer']}, {answer['net_gain']:.0%}")
        reports[name] = report | {"loads": name}
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print_json(reports)


if __name__ == "__main__":
    main()
