"""Compares folders of results: what `make bench` or `make gpu` found on several machines, or before and after a change.

    python -m benchmarks.report docs/results/intel-xeon-processor-2026-11-27 docs/results/my-machine-2026-12-01
    python -m benchmarks.report FOLDER FOLDER --step tiers      # every number of one step

The first folder is what the others are compared with.
"""

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.support.bench_tables import HEADLINES, PAPER
from benchmarks.support.results import Results, figures
from data.cli import OneLineParser, print_json, user_errors


def headlines(results: Results) -> dict[str, float]:
    """The figures of `HEADLINES` and `PAPER` that a folder has."""
    wanted = (HEADLINES | PAPER).items()
    return {name: results.value(step, read) for name, (step, read) in wanted if step in results.names}


def compared(folders: list[Results], step: str | None) -> dict[str, list[float | None]]:
    """Each figure in each folder, None where a folder does not have it.

    Raises:
        ValueError: If no folder has one.
    """
    if step is None:
        each = [headlines(results) for results in folders]
    else:
        each = [figures(results.document(step)) if step in results.names else {} for results in folders]
    names = list(dict.fromkeys(name for found in each for name in found))
    if not names:
        asked = "of the steps that README shows; name another with --step" if step is None else f"of --step {step}"
        known = ", ".join(sorted({name for results in folders for name in results.names})) or "none"
        raise ValueError(f"no folder has figures {asked}; steps that have results: {known}")
    return {name: [found.get(name) for found in each] for name in names}


def table(folders: list[Results], rows: dict[str, list[float | None]]) -> Table:
    """One row for each figure, one column for each folder; with two folders, their ratio too."""
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column("figure")
    for results in folders:
        made.add_column(f"{results.folder.name}\n{results.hardware}", justify="right")
    if len(folders) == 2:
        made.add_column("second / first", justify="right")
    for name, values in rows.items():
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        first, last = values[0], values[-1]
        if len(folders) == 2:
            cells.append(f"{last / first:.3f}" if first and last is not None else "")
        made.add_row(name, *cells)
    return made


def main() -> None:
    """Command line: a table and, in a pipe, one JSON document."""
    parser = OneLineParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of results; the first is compared with")
    parser.add_argument("--step", type=str, help="show every number of this step")
    with user_errors():
        given = parser.parse_args()
        folders = [Results(folder) for folder in given.folders]
        rows = compared(folders, given.step)
    Console(width=None if sys.stdout.isatty() else 150).print(table(folders, rows))
    document: dict[str, Any] = {"folders": [str(results.folder) for results in folders], "figures": rows}
    print_json(document)


if __name__ == "__main__":
    main()
