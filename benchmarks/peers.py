"""transformers' own tests of Mixtral, Qwen3-MoE and OLMoE, run within an engine.

    python -m benchmarks.peers
    python -m benchmarks.peers --transformers FOLDER    # a clone that is there already

Clones the tag of the installed transformers if FOLDER does not exist; nothing of it is part of this project. Every
call and every generation of a model in those tests runs within an engine with replicas in place
(benchmarks/support/in_engine.py). Prints a table and, in a pipe, one line of JSON; exit code 1 if a test fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import transformers
from rich.console import Console
from rich.table import Table

from data.cli import print_json

ROOT = Path(__file__).parents[1]
SOURCE = "https://github.com/huggingface/transformers"
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
NOT_FOR_ENGINES = {
    "train, gradient, retain_grad, load_balancing_loss, overfit": "training: the engine computes no gradients",
    "fsdp, hsdp, tp_, parallel, deepspeed, offload": "transformers' own ways of spreading a model over devices",
    "export, compil, onnx, executorch": "programs without Python: an engine decides anew in every batch",
    "batched_and_grouped": "sets other experts implementations",
    "flash": "needs a GPU",
    "pipeline, integration": "needs files of the hub",
}
"""Tests that are left out, by parts of their names, and why."""


def clone(folder: Path) -> None:
    """Clones transformers at the tag of the installed version.

    Raises:
        SystemExit: If that fails, with exit code 2.
    """
    tag = f"v{transformers.__version__}"
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, SOURCE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        sys.stderr.write(
            f"error: {SOURCE} could not be cloned at {tag} ({reason}); give a clone: --transformers FOLDER\n"
        )
        raise SystemExit(2)


def run_family(folder: Path, family: str, report: Path) -> dict[str, Any]:
    """Runs one family's tests; returns what pytest counted and what ran within an engine."""
    left_out = [part for parts in NOT_FOR_ENGINES for part in parts.split(", ")]
    command = [
        sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-p", "benchmarks.support.in_engine",
        "--engine-report", str(report), "-W", "ignore", "-k", " and ".join(f"not {part}" for part in left_out),
        f"tests/models/{family}/test_modeling_{family}.py",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", last)
    if done.returncode not in (0, 1) or not report.exists():
        sys.stderr.write(done.stdout[-4000:])
        _give_up(f"pytest ended with exit code {done.returncode} in {folder}; is it a clone of transformers?")
    if done.returncode:
        sys.stderr.write(done.stdout[-12_000:])
    ran: dict[str, Any] = json.loads(report.read_text())
    del ran["ran"]  # test by test
    return {what: int(number) for number, what in found} | ran


def _give_up(why: str) -> NoReturn:
    """Ends with one line and exit code 2."""
    sys.stderr.write(f"error: {why}\n")
    raise SystemExit(2)


def main() -> None:
    """Prints a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transformers", type=Path, default=ROOT / "outputs" / "transformers", metavar="FOLDER")
    folder = parser.parse_args().transformers.resolve()
    if not folder.exists():
        clone(folder)
    console = Console(stderr=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as reports:
        for family in FAMILIES:
            with console.status(f"{family}: transformers' tests within an engine"):
                results[family] = run_family(folder, family, Path(reports) / f"{family}.json")
    table = Table(title=f"transformers {transformers.__version__}: its tests within an engine")
    columns = {
        "passed": "passed", "failed": "failed", "skipped": "skipped", "deselected": "left out", "tests": "in an engine",
        "layers": "MoE layers run", "compared": "logits compared", "largest_difference": "largest difference",
    }  # fmt: skip
    for title in ("family", *columns.values()):
        table.add_column(title, justify="right")
    for family, found in results.items():
        table.add_row(family, *(f"{found.get(name, 0):.4g}" for name in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print_json({"transformers": transformers.__version__, "left out": NOT_FOR_ENGINES, "families": results})
    sys.exit(any(found.get("failed", 0) or found.get("error", 0) or not found["tests"] for found in results.values()))


if __name__ == "__main__":
    main()
