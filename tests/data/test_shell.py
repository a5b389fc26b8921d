"""Printed command lines start the environment that printed them, from the folder where they were printed."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAYS = "import sys; from data.shell import typed; print(typed(sys.argv[1]))"


@pytest.fixture
def environment(tmp_path):
    """An environment's folder of programs, and a function that runs its `typed` in a folder."""
    programs = tmp_path / "project of mine" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(Path(sys.executable).resolve())
    (programs / "torchrun").write_text("#!/bin/sh\nexit 0\n")
    (programs / "torchrun").chmod(0o755)

    def printed(line: str, folder: Path, active: bool) -> str:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}" if active else os.environ["PATH"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
        command = [programs / "python", "-c", SAYS, line]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=True).stdout.strip()

    return programs, printed


@pytest.mark.parametrize("active", [True, False])
def test_an_environment_in_the_working_folder_is_a_relative_path(environment, active):
    programs, printed = environment
    folder = programs.parents[1]
    assert printed("python -m predictor.show a", folder, active) == ".venv/bin/python -m predictor.show a"
    assert printed("torchrun --nproc-per-node 2 -m m", folder, active) == (
        ".venv/bin/python -m torch.distributed.run --nproc-per-node 2 -m m"
    )
    assert printed("switchcast export a", folder, active) == ".venv/bin/python -m switchcast export a"
    assert printed("make run", folder, active) == "make run"


def test_elsewhere_an_active_environment_is_called_by_name_and_another_by_its_path(environment, tmp_path):
    programs, printed = environment
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert printed("python train.py", elsewhere, True) == "python train.py"
    assert printed("torchrun -m m", elsewhere, True) == "torchrun -m m"
    assert printed("switchcast show a", elsewhere, True) == f"'{programs}/python' -m switchcast show a"
    line = printed("python -c 'import sys; print(sys.executable)'", elsewhere, False)
    ran = subprocess.run(shlex.split(line), capture_output=True, text=True, cwd=elsewhere, check=True)
    assert ran.stdout.strip() == str(programs / "python")
