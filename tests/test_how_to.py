"""The commands of the how-to pages run, in the order of the pages, and what they write is there for the next.

The quick start's `make run` is not repeated: its predictor is stood in for by one that was trained on the little trace
of how-to/trace.md. What needs an account, a hub or several machines is named in NOT_RUN; `test_docs` parses it. All
pages take ten minutes (`make how-to`); those that lead from a text to a deployed predictor are run always.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import BLOCK, ROOT

PAGES = ("trace", "train", "sweep", "deploy", "several-gpus", "memory-budget", "telemetry")
PROGRAMS = ("python ", "switchcast ", "torchrun ", "wandb ", "mkdir ", "cp ", "make ", "source ")
NOT_RUN = {
    "wandb ": "needs an account",
    "offline=false": "needs an account",
    "wandb_workspace": "needs an account",
    "configs/models/": "needs a hub and several GPUs",
    "--nnodes": "needs several machines",
    "make run": "takes minutes; its parts are the other commands",
    "source ": "sets up a shell",
    "--ckpt_path last": "goes on with a run that was interrupted; tests/predictor/training interrupts one",
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
    trace, train = (commands(f"docs/how-to/{page}.md") for page in PAGES[:2])
    done = [*trace[:3], train[0]]
    for command in done:
        run(command, folder)
    shutil.copytree(folder / "outputs/mine", folder / "outputs/predictor")
    (folder / "outputs/traces/switch-mini-64").symlink_to(folder / "outputs/traces/mine")
    return folder, done


def page_of(name: str) -> Any:
    """A page, with a mark that skips it unless all are asked for."""
    rest = os.environ.get("HOW_TO") != "all" and name not in ("trace", "deploy")
    path = f"docs/{name}.md" if name == "quick-start" else f"docs/how-to/{name}.md"
    return pytest.param(path, marks=pytest.mark.skipif(rest, reason="`make how-to` runs all pages"), id=name)


@pytest.mark.parametrize("page", map(page_of, ("quick-start", *PAGES)))
def test_commands_of_a_page_run(page, workshop):
    folder, done = workshop
    found = commands(page)
    assert found
    for command in found:
        if command not in done and not any(part in command for part in NOT_RUN):
            run(command, folder)
