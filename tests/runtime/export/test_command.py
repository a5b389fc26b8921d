"""`switchcast export` and `switchcast check-plan` as they are typed: output, exit codes, nothing half-written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.simulate import compare_policies
from runtime.simulate.cost_model import Hardware

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "tests" / "runtime" / "recorded" / "dsv2lite.npz"


@pytest.fixture
def run(tmp_path):
    """Runs a command in an empty folder; returns exit code, output and errors."""

    def call(*words, stdin=None):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "switchcast", *words], capture_output=True, text=True, cwd=tmp_path, env=env,
            input=stdin,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


def test_a_recording_goes_to_sglang_and_is_checked(run, tmp_path):
    code, out, err = run("export", str(RECORDED), "--to", "sglang", "--layers", "1,7,13,19,25", "--hidden-layers", "27")
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document["plan"] == "outputs/plan-sglang.json"
    assert "--init-expert-location outputs/plan-sglang.json --ep-num-redundant-experts 16 --ep-size 8" in err
    good = run("check-plan", "outputs/plan-sglang.json", "--devices", "8", "--redundant", "16", "--hidden-layers", "27")
    assert good[0] == 0, good
    assert "nothing wrong was found" in good[2]
    code, out, err = run("check-plan", "outputs/plan-sglang.json", "--devices", "8", "--hidden-layers", "26")
    assert code == 1
    assert err.count("problem: ") == len(json.loads(out.splitlines()[-1])["problems"]) == 1
    assert run("check-plan", "none.json")[::2] == (2, "error: none.json does not exist\n")


@pytest.mark.parametrize("engine", ["sglang", "vllm", "tensorrt-llm", "vllm-ascend", "switchcast"])
def test_plans_of_devices_that_do_not_divide_the_experts(run, engine, tmp_path):
    simulated = compare_policies(
        RECORDED, 6, 8, ("last",), ("home",), ("quota",), steps=4, save_plans=tmp_path / "plans.npz",
        hardware=Hardware(9437184, 1e5, 25e9, 0),
    )  # fmt: skip
    assert simulated["experts"] % simulated["devices"]
    plan = f"plan.{'yaml' if engine == 'tensorrt-llm' else 'json'}"
    code, _, err = run("export", "plans.npz", "--to", engine, "--layers", "0-4", "--hidden-layers", "5", "--out", plan)
    assert code == 0, err
    code, _, err = run("check-plan", plan, "--devices", "6", "--experts", "64", "--redundant", "8", "--layers", "0-4")
    assert (code, "nothing wrong was found" in err) == (0, True), err


def test_loads_from_a_pipe(run, tmp_path):
    code, _, err = run("export", "-", "--to", "vllm", "--devices", "2", "--redundant", "2", stdin="[[9, 1, 1, 1]]")
    assert code == 0, err
    (row,) = json.loads((tmp_path / "outputs" / "plan-vllm.json").read_text())
    assert row.count(0) == 2
    assert "no release of vLLM reads a map" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "error: --to is missing, expected one of sglang, vllm, tensorrt-llm, vllm-ascend, switchcast"),
        (("--to", "sglang"), "error: SGLang numbers all layers of a model"),
        (("--to", "vllm", "--devices", "7"), "error: 64 experts and 16 redundant experts do not divide over 7 devices"),
        (("--to", "vllm", "--step", "x"), "error: --step is 'x', expected a whole number; see --help"),
        (("--to", "vllm", "--out", ""), "error: --out is empty; is a shell variable not set? Give a value"),
        (("--to", "vllm", "--hidden-layers", "27"), f"error: {RECORDED} has 5 layers, the model 27 (--hidden-layers)"),
        (("--to", "vllm", "--step", "1"), "error: --step has no meaning for loads; leave it out"),
        (("--to", "vllm", "--model", "nowhere"), "error: nowhere"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, tmp_path, words, said):
    code, out, err = run("export", str(RECORDED), *words)
    assert (code, out) == (2, "")
    assert err.startswith(said), err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_worked_example_prints_what_the_page_shows(run, tmp_path):
    """docs/export.md: each command of the example, with the lines that it prints."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    page = (ROOT / "docs" / "export.md").read_text().split("## From a recording to SGLang")[1].split("\n## ")[0]
    lines = re.findall(r"^    (.*)$", page.split("```")[0], re.MULTILINE)
    commands = [number for number, line in enumerate(lines) if line.startswith("switchcast ")]
    assert len(commands) == 2
    for first, after in zip(commands, [*commands[1:], None], strict=True):
        code, _, printed = run(*lines[first].split()[1:])
        assert (code, printed.splitlines()) == (0, lines[first + 1 : after])
