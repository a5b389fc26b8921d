"""Faults: does to the program what is promised to be survived or refused, and prints what happened.

    python -m stress.faults                       # all, about a quarter of an hour
    python -m stress.faults --list
    python -m stress.faults --only disk           # those whose name contains "disk"

Prints one row for each fault as it ends and, in a pipe, one line of JSON; exit code 1 if a promise was broken.
Full disks need the right to mount a file system, the false clock a C compiler; what cannot be done is skipped and said.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.cli import print_json
from runtime.balancing.balancer import compile_kernels
from stress.faults import disks, forecasts, lost_ranks, runs, tiers
from stress.faults.fault import Fault

FAULTS: list[Fault] = [*lost_ranks.FAULTS, *disks.FAULTS, *tiers.FAULTS, *forecasts.FAULTS, *runs.FAULTS]


def happened(fault: Fault) -> dict[str, Any]:
    """Does it in a folder of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="switchcast-fault-", ignore_cleanup_errors=True) as folder:
        try:
            kept, text = True, fault.check(Path(folder))
        except NotImplementedError as reason:
            kept, text = None, f"skipped: {reason}"
        except Exception as error:  # a promise that was not kept, in whatever way
            kept, text = False, f"{type(error).__name__}: {error}"
        text = text.replace(folder, "...")
    row = {"fault": fault.name, "done": fault.done, "promised": fault.promised, "happened": text, "kept": kept}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the table."""
    table = Table(title="Faults", show_lines=True)
    for column in ("done", "promised", "happened", "kept"):
        table.add_column(column)
    for row in rows:
        kept = {True: "yes", False: "NO", None: "-"}[row["kept"]]
        table.add_row(*(Text(cell) for cell in (row["done"], row["promised"], row["happened"][:600], kept)))
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the faults to run")
    parser.add_argument("--list", action="store_true", help="prints the names of all faults and ends")
    given = parser.parse_args()
    chosen = [fault for fault in FAULTS if given.only in fault.name]
    if not chosen:
        parser.error(f"no fault is named {given.only!r}; see --list")
    if given.list:
        print("\n".join(fault.name for fault in chosen))
        return
    compile_kernels()
    rows, console = [], Console(stderr=True)
    for fault in chosen:
        rows.append(happened(fault))
        kept = {True: "kept", False: "BROKEN", None: "skipped"}[rows[-1]["kept"]]
        console.print(
            f"{fault.name}: {kept} ({rows[-1]['seconds']} s) {rows[-1]['happened']}", markup=False, highlight=False
        )
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    print_json({"python": platform.python_version(), "torch": torch.__version__, "faults": rows})
    sys.exit(any(row["kept"] is False for row in rows))


if __name__ == "__main__":
    main()
