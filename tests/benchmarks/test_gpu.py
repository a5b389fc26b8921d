"""The checks for a GPU machine: their plumbing with trivial commands, and their refusal where there is no GPU."""

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import benchmarks.expert_parallel
import benchmarks.gpu
from benchmarks.gpu import TESTED, all_steps, chosen, powers
from benchmarks.support.steps import Step, as_typed, last_json, run_all
from runtime.infer.__main__ import infer
from tests.test_docs import parse  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_failed_or_endless_step_is_recorded_and_the_rest_runs(tmp_path):
    endless = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    steps = [
        Step("good", python("print('a table'); print('{\"ms\": 3}')"), 20, files=(tmp_path / "each.json",)),
        Step("bad", python("import sys; print('why', file=sys.stderr); sys.exit(3)"), 20),
        Step("endless", python(endless), 1.5),
        Step(
            "counted",
            python("import os, sys; print(os.environ['A'] * 2, file=sys.stderr)"),
            20,
            {"A": "x sync y\n"},
            "sync",
        ),
        Step("missing", [str(tmp_path / "no-such-program")], 20),
    ]
    (tmp_path / "each.json").write_text("[1, 2]")
    began = time.monotonic()
    done = run_all(steps, tmp_path / "out", "A title", "make gpu")
    assert time.monotonic() - began < 40
    assert [(step["status"], step["exit_code"]) for step in done] == [
        ("ok", 0), ("failed", 3), ("timed out", None), ("ok", 0), ("failed", 127),
    ]  # fmt: skip
    assert done[3]["counted"] == {"sync": 2}
    out = tmp_path / "out"
    assert json.loads((out / "good.json").read_text()) == {"ms": 3}
    assert done[0]["files"] == ["good-each.json"]
    assert (out / "good-each.json").read_text() == "[1, 2]"
    assert (out / "bad.log").read_text() == "why\n"
    assert not (out / "bad.json").exists()
    assert not alive(int((out / "endless.txt").read_text())), "a step's children end with it"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == done
    assert summary["machine"]["libraries"]["torch"] == torch.__version__.partition("+")[0]
    page = (out / "README.md").read_text()
    assert page.startswith("# A title\n")
    assert "| endless | timed out |" in page
    assert "2 x sync | `A=" in page
    assert "a table" in page
    assert sys.executable not in page, "a path may name the user"


def test_an_interrupt_ends_the_step_and_keeps_what_is_done(tmp_path):
    script = (
        "import sys; from pathlib import Path; from benchmarks.support.steps import Step, run_all; "
        "run_all([Step('one', [sys.executable, '-c', 'print(1)'], 9), "
        "Step('two', [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'], 99)], "
        f"Path({str(tmp_path / 'out')!r}), 'T', 'make gpu')"
    )
    process = subprocess.Popen(python(script), cwd=ROOT, stderr=subprocess.DEVNULL)
    printed = tmp_path / "out" / "two.txt"
    deadline = time.monotonic() + 60
    while not (printed.exists() and printed.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(2)
    assert process.wait(30) != 0
    assert not alive(int(printed.read_text()))
    assert [step["name"] for step in json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]] == ["one"]


def test_without_a_gpu_it_refuses_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: torch finds no CUDA device; ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_says_whether_all_steps_are_ok(failing, code, tmp_path, monkeypatch, capsys):
    steps = [Step("one", python("print('{}')"), 20), Step("two", python(f"raise SystemExit({int(failing)})"), 20)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(benchmarks.gpu, "all_steps", lambda gpus, predictor, aside: steps)
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        benchmarks.gpu.main()
    assert stop.value.code == code
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["failed"] == ["two"] * failing
    (out,) = Path("docs/results").iterdir()
    assert said["out"] == str(out)
    assert out.name.startswith("nvidia-h100-80gb-hbm3-20")
    with pytest.raises(SystemExit) as stop:
        benchmarks.gpu.main()
    assert stop.value.code == 2
    assert "exists already; name another folder" in capsys.readouterr().err


def options_of(command: list[str]) -> set[str]:
    return {word[2:].replace("-", "_") for word in command if word.startswith("--")}


@pytest.mark.parametrize("gpus", [1, 2, 6, 8])
def test_steps_name_options_that_exist(gpus, monkeypatch):
    steps = all_steps(gpus, None, Path("outputs/gpu"))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert {f"replication-{ranks}-bfloat16" for ranks in powers(gpus)} <= set(names)
    assert ("one-queue" in names) == (gpus > 1)
    assert (f"exactness-bfloat16-{ {1: 0, 2: 2, 6: 4, 8: 8}[gpus] }-gpus" in names) == (gpus > 1)
    known = set(inspect.signature(infer).parameters) | {"standalone", "nproc_per_node"}
    commands = [
        step.command for step in steps if "runtime.infer" in step.command or benchmarks.gpu.WATCHED in step.command
    ]
    assert len(commands) >= 6
    for command in commands:
        tool = command[command.index(sys.executable) :]  # compute-sanitizer's own options come before
        assert options_of(tool) <= known, tool
    for step in steps:
        if step.name.startswith("replication"):
            words = step.command[step.command.index("benchmarks.expert_parallel") :]
            monkeypatch.setattr("sys.argv", words)
            options = benchmarks.expert_parallel.parse()
            ranks = int(step.name.split("-")[1])
            assert options.experts % ranks == options.redundant % ranks == 0
            assert step.name.endswith(options.dtype)
    assert powers(gpus) == {1: [1], 2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}[gpus]


def test_the_papers_experiment_is_commands_that_parse(parse):  # noqa: F811
    steps = chosen(all_steps(1, Path("mine"), Path("a")), "paper")
    assert [step.name for step in steps] == [
        "paper-speed-bfloat16", "paper-quality-bfloat16", "paper-speed", "paper-quality",
    ]  # fmt: skip
    assert {step.name: said for step in steps if (said := parse(as_typed(step.command).split()))} == {}


def test_steps_are_chosen_by_beginnings_in_the_order_asked_for():
    steps = all_steps(1, Path("mine"), Path("a"))
    names = [step.name for step in chosen(steps, "syncs, exactness-float32,one-device-top-4,exactness")]
    assert names == [
        "syncs", "exactness-float32", "exactness-float32-8-emulated", "one-device-top-4",
        "exactness-bfloat16", "exactness-bfloat16-8-emulated",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--only names 'papers', and no step begins with it; steps are tests, collect"):
        chosen(steps, "tests,papers")


def test_every_test_that_needs_a_gpu_is_in_a_folder_that_is_run():
    marked = [path for path in (ROOT / "tests").rglob("*.py") if "\n@pytest.mark.gpu\n" in path.read_text()]
    assert len(marked) >= 3
    assert [path for path in marked if not any(path.is_relative_to(ROOT / folder) for folder in TESTED)] == []


def test_a_predictor_is_trained_only_where_there_is_none():
    assert "predictor" in [step.name for step in all_steps(1, None, Path("a"))]
    given = all_steps(1, Path("mine"), Path("a"))
    assert "predictor" not in [step.name for step in given]
    assert "mine" in next(step for step in given if step.name == "exactness-float32").command


@pytest.mark.parametrize(
    ("text", "found"), [('a\n{"b": 1}\n', {"b": 1}), ('{"b": 1}\na', None), ("[1]", None), ("", None)]
)
def test_only_a_last_line_of_json_is_a_document(text, found):
    assert last_json(text) == found
