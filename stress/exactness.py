"""Exactness at scale: random cases against the plain loop over experts, in one process and on several ranks.

    python -m stress.exactness                                   # 100,000 cases, about ten minutes
    python -m stress.exactness --cases 2000 --seed 7
    python -m stress.exactness --case layer:seed=5,experts=4     # one case, as a failure prints it

A case is one batch, computed by MoE layers or by a whole model under one plan and compared with the unmodified
computation. Batches come in chains through the same layers, so that plans, moves and caches have a past. The chains are
drawn from the seed: geometry, routing, padding, dropped tokens, plan, moves before, during and within a batch, price of
an expert, nodes, memory budget (stress/layer_cases.py, stress/model_cases.py). Where a case fails, its values are made
simpler for as long as it fails, and the command that runs what is left is printed.

Prints a table and, in a pipe, one line of JSON; exit code 1 if a case failed.
"""

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict
from functools import partial

import torch
import transformers
from rich.console import Console
from rich.status import Status
from rich.table import Table

from data.cli import print_json
from runtime.balancing.balancer import compile_kernels
from runtime.experts.dispatch import compile_kernels as compile_dispatch
from stress.chains import KINDS, MODES, Totals, error_of, reproducer, run_mode


def _count(status: Status, name: str, cases: int, done: int) -> None:
    status.update(f"{name}: {done:,} of {cases:,}")


def show(totals_of: dict[str, Totals], console: Console) -> None:
    """Prints what each mode found."""
    table = Table(title="Random cases against the plain loop")
    for column in ("mode", "cases", "to the bit", "plans", "dropped tokens", "largest difference float32", "bfloat16"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for name, totals in totals_of.items():
        largest = [
            f"{totals.largest[dtype]:.1e}" if dtype in totals.largest else "-" for dtype in ("float32", "bfloat16")
        ]
        equal = f"{totals.equal / max(totals.cases, 1):.1%}"
        table.add_row(name, f"{totals.cases:,}", equal, f"{totals.moved:,}", f"{totals.dropped:,}", *largest)
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="cases over all modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", metavar="KIND:VALUES", help="runs this case alone, as a failure prints it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # which kernels are absent
    transformers.logging.disable_progress_bar()
    compile_kernels()
    compile_dispatch()
    if given.case:
        kind, _, text = given.case.partition(":")
        if kind not in KINDS:
            parser.error(f"--case is {given.case!r}, expected layer:... or model:...")
        try:
            case = KINDS[kind][0].parse(text)
        except ValueError as error:
            parser.error(str(error))
        found = error_of(kind, case)
        print(found or "passed")
        sys.exit(bool(found))
    began, console, totals_of = time.perf_counter(), Console(stderr=True), {}
    for mode in MODES:
        cases = max(round(mode.share * given.cases), 1)
        with console.status(mode.name) as status:
            totals = totals_of[mode.name] = run_mode(mode, given.seed, cases, partial(_count, status, mode.name, cases))
        if totals.failed is not None:
            print(f"{mode.name}: {totals.failed} fails: {totals.error}")
            if "=" in totals.failed:
                command, found = reproducer(mode.kind, totals.failed)
                print(f"smallest case found: {found}\n    {command}")
    show(totals_of, Console(width=None if sys.stdout.isatty() else 140))
    print_json({
        "cases": sum(totals.cases for totals in totals_of.values()), "seed": given.seed,
        "seconds": round(time.perf_counter() - began), "python": platform.python_version(), "torch": torch.__version__,
        "processors": os.cpu_count(), "modes": {name: asdict(totals) for name, totals in totals_of.items()},
    })  # fmt: skip
    sys.exit(any(totals.failed is not None for totals in totals_of.values()))


if __name__ == "__main__":
    main()
