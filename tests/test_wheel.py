"""A wheel, installed beside a project that has a `data` package of its own, works and disturbs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("data", "predictor", "runtime", "switchcast", "configs", "train.py", "setup.py", "pyproject.toml",
           "MANIFEST.in", "README.md", "LICENSE", "NOTICE")  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python with the wheel installed, in the folder of somebody's project."""
    work = tmp_path_factory.mktemp("wheel")
    source, site, project = work / "source", work / "site", work / "project"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(work.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    (project / "data").mkdir(parents=True)
    (project / "data" / "__init__.py").write_text("OWNER = 'the project'\n")

    def run(*words, folder=project):
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run.project, run.work = project, work
    return run


def test_every_public_name_comes_from_the_wheel_and_the_projects_own_package_stays(python):
    script = """
import data, switchcast
assert data.OWNER == "the project"
for name in switchcast.__all__:
    where = getattr(switchcast, name).__module__
    assert where.startswith("switchcast."), (name, where)
from switchcast.data.models.model import load_model
print(load_model("switch-mini-64").layout.num_experts)
"""
    assert python("-c", script).split() == ["64"]


def test_commands_work_beside_it(python):
    np.save(python.project / "loads.npy", np.random.default_rng(0).poisson(20, (6, 1, 8)))
    command = ["loads.npy", "--redundant", "0", "--planner", "home", "--forecast", "last", "--out", "simulated"]
    report = json.loads(python("-m", "switchcast", "simulate", *command).splitlines()[-1])
    assert report["devices"] == 8
    assert "--predictor" in python("-m", "switchcast", "train", "--help")


def test_measured_times_of_gpus_come_with_their_notice(python):
    np.save(python.project / "even.npy", np.full((6, 1, 8), 64))
    command = ["even.npy", "--gpu", "h100_sxm", "--like", "mixtral_8x7b", "--forecast", "last", "--out", "gpu"]
    report = json.loads(python("-m", "switchcast", "simulate", *command, "--redundant", "8").splitlines()[-1])
    assert report["verdict"]["hardware"]["tables"] == "excerpt"
    script = """
from pathlib import Path
import switchcast
package = Path(switchcast.__file__).parent
(notice,) = package.parent.glob("switchcast-*.dist-info/licenses/NOTICE")
print("Apache License" in notice.read_text(), (package / "runtime/gpu/measured/NOTICE").is_file())
"""
    assert python("-c", script).split() == ["True", "True"]


def test_short_names_work_where_nothing_else_has_them(python):
    assert "--predictor" in python("-m", "runtime.infer", "--help", folder=python.work)
    script = "import runtime, switchcast; assert runtime.Balancer is switchcast.Balancer"
    python("-c", script, folder=python.work)
