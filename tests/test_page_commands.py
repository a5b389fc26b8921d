"""The commands of README and docs run, and what those of a page write is there for the next.

`make run` is not repeated: its predictor is stood in for by one that was trained on the little trace of
how-to/trace.md. What is not run is named in NOT_RUN; `test_docs` parses it. All pages take a quarter of an hour (`make
page-commands`); those that lead from a text to a deployed predictor are run always.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.steps import in_shell
from data.files import read_json
from tests.test_docs import BLOCK, ROOT

HOW_TO = ("trace", "train", "sweep", "deploy", "several-gpus", "memory-budget", "telemetry")
PAGES = (
    *(f"docs/how-to/{name}.md" for name in HOW_TO), "docs/quick-start.md", "README.md", "docs/faq.md", "docs/export.md",
    "docs/simulator.md", "docs/worth-it.md", "docs/reliability.md", "docs/runtime.md", "docs/tiers.md",
    "docs/results/README.md",
)  # fmt: skip
ALWAYS = ("docs/how-to/trace.md", "docs/how-to/deploy.md")
PROGRAMS = ("python ", "switchcast ", "torchrun ", "mkdir ", "cp ")
NOT_RUN = {
    "offline=false": "needs an account",
    "wandb_workspace": "needs an account",
    "configs/models/": "needs a hub and several GPUs",
    "--nnodes": "needs several machines",
    "google/": "needs a hub",
    "qwen3-mini-64/predictor": "needs a predictor that trains for minutes; make bench-long",
    "configs/qwen3_mini.yaml": "trains for minutes; make bench-long",
    "--ckpt_path last": "goes on with a run that was interrupted; tests/predictor/training interrupts one",
    "benchmarks.": "measures for minutes; a step of a folder in docs/results",
    "LOADS": "stands for the reader's file",
    "TRACE": "stands for the reader's file",
    "RECORDINGS": "stands for the reader's folder",
    "recording.pt": "stands for the reader's file",
    "FOLDER": "stands for the reader's model",
    "--hidden-layers 61": "checks the plan of the reader's file",
}
"""Parts of commands that are not run, and why."""


def commands(page: str) -> list[str]:
    """The commands in the code blocks of a page."""
    blocks = [(match[1] or match[2]).replace("\\\n", " ") for match in BLOCK.finditer((ROOT / page).read_text())]
    lines = [line.split("   # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(PROGRAMS)]


def run(command: str, folder: Path) -> None:
    """Runs a command in a folder with the interpreter of the tests."""
    programs = {"python": [sys.executable], "switchcast": [sys.executable, "-m", "switchcast"],
                "torchrun": [sys.executable, "-m", "torch.distributed.run"]}  # fmt: skip
    name, _, rest = command.partition(" ")
    words = " ".join([*programs.get(name, [name]), rest])
    done = subprocess.run(
        words, shell=True, cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder like a clone, with the trace and predictor of the pages about tracing and training, and what has run."""
    folder = tmp_path_factory.mktemp("workshop")
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("configs", "docs", "examples", "tests", "README.md"))):
        (folder / path.name).symlink_to(path)
    trace, train, _, deploy = (commands(page) for page in PAGES[:4])
    done = [*trace[:3], train[0], *(command for command in deploy if "export" in command)]
    for command in done:
        run(command, folder)
    shutil.copytree(folder / "outputs/mine", folder / "outputs/predictor")
    (folder / "outputs/traces/switch-mini-64").symlink_to(folder / "outputs/traces/mine")
    return folder, done


def page_of(path: str) -> Any:
    """A page, with a mark that skips it unless all are asked for."""
    rest = os.environ.get("PAGES") != "all" and path not in ALWAYS
    return pytest.param(path, marks=pytest.mark.skipif(rest, reason="`make page-commands` runs all pages"), id=path)


def test_what_is_not_run_stands_on_a_page():
    said = [command for page in PAGES for command in commands(page)]
    assert [part for part in NOT_RUN if not any(part in command for command in said)] == []


def test_no_page_with_commands_is_left_out():
    """Results name the commands that gave them, and the log those of its day."""
    pages = (str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
    others = (page for page in pages if page not in PAGES and not re.search(r"results/.+/|log\.md", page))
    assert [page for page in others if commands(page)] == []


def test_benchmarks_on_a_page_are_steps_of_a_folder():
    summaries = (ROOT / "docs/results").glob("*/summary.json")
    steps = {in_shell(step) for summary in summaries for step in read_json(summary)["steps"]}
    said = [(page, command) for page in PAGES for command in commands(page) if "benchmarks." in command]
    assert said
    assert [(page, command) for page, command in said if re.sub(" +", " ", command) not in steps] == []


@pytest.mark.parametrize("page", [page_of(path) for path in PAGES])
def test_commands_of_a_page_run(page, workshop):
    folder, done = workshop
    found = commands(page)
    assert found
    for command in found:
        if command not in done and not any(part in command for part in NOT_RUN):
            run(command, folder)
