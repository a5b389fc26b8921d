"""Damaged, edited and forged files for everything that reads files from outside.

    python -m stress.fuzz                               # 1,000 files for each of the readers, about ten minutes
    python -m stress.fuzz --only "trace.json" --cases 5000
    python -m stress.fuzz --only "trace.json" --case 1234 --keep /tmp/found   # one file, as a failure prints it

Each file must be refused in one line, or give a valid result: no other exception, no command run, nobody waits longer
than ten seconds, no more than 1 GiB of memory, nothing is left behind. Prints a table and, in a pipe, one line of
JSON; exit code 1 if a promise was not kept.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.cli import print_json
from data.errors import one_line
from data.shell import typed
from stress.loaders import TARGETS, Target
from stress.mutations import mutate

LONGEST_S, MOST_BYTES = 10, 2**30
RUNS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect"}
"""Audit events that no file may cause."""
WORKERS = 2


@dataclass
class Outcomes:
    """What became of the files for one reader.

    Attributes:
        refused: Files that were refused in a line.
        taken: Files that gave a valid result.
        faults: Kind of a fault -> number of files.
        first: Kind of a fault -> number of the first such file, and what happened.
    """

    refused: int = 0
    taken: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, case: int, kind: str, detail: str) -> None:
        """Counts one file."""
        if kind == "refused":
            self.refused += 1
        elif kind == "taken":
            self.taken += 1
        else:
            self.faults[kind] += 1
            self.first.setdefault(kind, (case, detail))


def prepare(target: Target, valid: Path, folder: Path, seed: int, case: int) -> None:
    """Copies the valid example and changes one of its files."""
    shutil.copytree(valid, folder)
    rng = np.random.default_rng((seed, zlib.crc32(target.name.encode()), case))
    files = sorted(folder.glob(target.changed))
    file = files[rng.integers(len(files))]
    file.write_bytes(mutate(file.read_bytes(), file.suffix, rng))
    if target.repair is not None and rng.random() < 0.8:
        target.repair(folder)


def outcome(target: Target, folder: Path, ran: list[str]) -> tuple[str, str]:
    """What becomes of one changed example: kind and detail."""
    before, memory = sorted(folder.rglob("*")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ran.clear()
    try:
        target.read(folder)
        found = "taken", ""
    except (ValueError, OSError) as error:
        found = ("refused", one_line(error)) if str(error) else ("no message", type(error).__name__)
    except AssertionError as error:
        found = "wrong content", str(error)
    except BaseException as error:
        found = type(error).__name__, str(error)[:300]
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    if ran:
        return "code ran", ran[0]
    if grown > MOST_BYTES:
        return "memory", f"{grown / 2**30:.1f} GiB"
    if left := sorted(set(folder.rglob("*")) - set(before)):
        return "left behind", str(left[0].relative_to(folder))
    return found


def work(name: str, valid: Path, seed: int, cases: range, pipe: Connection) -> None:
    """Runs cases in a process of its own, and sends what becomes of each."""
    ran: list[str] = []
    sys.addaudithook(lambda event, args: ran.append(f"{event} {args!r}"[:200]) if event in RUNS else None)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    torch.set_num_threads(1)
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(dir=valid.parent) as scratch:
        for case in cases:
            folder = Path(scratch) / str(case)
            prepare(target, valid, folder, seed, case)
            pipe.send((case, *outcome(target, folder, ran)))
            shutil.rmtree(folder)


class Worker:
    """A process that runs some of the cases; where it hangs or dies, another one goes on behind that case."""

    def __init__(self, name: str, valid: Path, seed: int, cases: range) -> None:
        self._about, self.cases = (name, valid, seed), cases
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (*self._about, self.cases, theirs)
        self._process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def next(self) -> tuple[int, str, str]:
        """What becomes of the next case."""
        case, self.cases = self.cases[0], self.cases[1:]
        try:
            if self.pipe.poll(LONGEST_S):
                found: tuple[int, str, str] = self.pipe.recv()
                return found
            kind = "hangs"
        except EOFError:
            kind = "process died"
        self._process.kill()
        self._process.join()
        detail = f"exit code {self._process.exitcode}"
        self._start()
        return case, kind, detail


def run_target(name: str, seed: int, cases: int, progress: Progress) -> Outcomes:
    """Runs all cases of a target over some workers."""
    outcomes, task = Outcomes(), progress.add_task(name, total=cases)
    with tempfile.TemporaryDirectory() as place:
        valid = Path(place) / "valid"
        valid.mkdir()
        TARGETS[name].write(valid)
        TARGETS[name].read(valid)  # the valid example is read, and what is compiled or imported first is ready
        workers = [Worker(name, valid, seed, range(start, cases, WORKERS)) for start in range(min(WORKERS, cases))]
        while workers := [worker for worker in workers if worker.cases]:
            for worker in workers:
                outcomes.add(*worker.next())
                progress.advance(task)
    return outcomes


def show(found_by: dict[str, Outcomes], seed: int, console: Console) -> None:
    """Prints the table, and how to repeat what went wrong."""
    table = Table(title="Damaged, edited and forged files")
    for column in ("reader", "files", "refused in a line", "valid result", "faults"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, outcomes in found_by.items():
        faults = sum(outcomes.faults.values())
        figures = (outcomes.refused + outcomes.taken + faults, outcomes.refused, outcomes.taken, faults)
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    console.print(table)
    for name, outcomes in found_by.items():
        for kind, (case, detail) in outcomes.first.items():
            console.print(f"{name}: {kind}, {outcomes.faults[kind]} times: {detail}", soft_wrap=True, markup=False)
            again = typed(f'python -m stress.fuzz --seed {seed} --only "{name}" --case {case}')
            console.print(f"    {again}", markup=False)


def run_one(name: str, seed: int, case: int, keep: Path | None) -> str:
    """Runs one case in this process, with its traceback if it has one."""
    with tempfile.TemporaryDirectory() as place:
        valid, folder = Path(place) / "valid", keep or Path(place) / "case"
        valid.mkdir()
        TARGETS[name].write(valid)
        prepare(TARGETS[name], valid, folder, seed, case)
        try:
            TARGETS[name].read(folder)
        except (ValueError, OSError) as error:
            return f"refused: {one_line(error)}"
        return "valid result"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(TARGETS), help="this reader alone")
    parser.add_argument("--cases", type=int, default=1000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="runs this file alone; needs --only")
    parser.add_argument("--keep", type=Path, help="keeps the folder of --case here")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if given.case is not None:
        if given.only is None:
            parser.error("--case needs --only")
        print(run_one(given.only, given.seed, given.case, given.keep))
        return
    names, began, found_by = [given.only] if given.only else list(TARGETS), time.perf_counter(), {}
    with Progress(console=Console(stderr=True)) as progress:
        for name in names:
            found_by[name] = run_target(name, given.seed, given.cases, progress)
    show(found_by, given.seed, Console(width=None if sys.stdout.isatty() else 140))
    found = {name: {"refused": t.refused, "valid": t.taken, "faults": dict(t.faults)} for name, t in found_by.items()}
    document: dict[str, Any] = {"seed": given.seed, "seconds": round(time.perf_counter() - began), "readers": found}
    print_json(document)
    sys.exit(any(outcomes.faults for outcomes in found_by.values()))


if __name__ == "__main__":
    main()
