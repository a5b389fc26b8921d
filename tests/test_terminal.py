"""At a terminal commands print text for people; a pipe gets one line of JSON as well, as its last."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "predictor", "runtime", "switchcast", "benchmarks", "stress", "examples")
RECORDED = ROOT / "tests" / "runtime" / "recorded"


def at_terminal(command: list[str]) -> str:
    """What a command writes to stdout where that is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd=ROOT) as run:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 1 << 16):
                written += part
        except OSError:  # Linux: the other end is closed
            pass
    os.close(ours)
    assert run.returncode == 0
    return written.decode()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["benchmarks.skew_cost"], "tokens an expert"),
        (["runtime.simulate", f"{RECORDED / 'gptoss20b.npz'}", "--steps", "2"], "Verdict:"),
    ],
)
def test_json_is_for_pipes(words, shown, tmp_path):
    command = [sys.executable, "-m", *words, *(["--out", f"{tmp_path}"] if words[0] == "runtime.simulate" else [])]
    seen = at_terminal(command)
    assert shown in seen
    assert "{" not in seen
    piped = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    assert isinstance(json.loads(piped[-1]), dict)
    assert any(shown in line for line in piped[:-1])


def test_one_place_decides_where_json_is_printed():
    files = [ROOT / "train.py", *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
    printing = [file for file in files if re.search(r"\bprint\(\s*json\.dumps\(", file.read_text())]
    assert printing == [ROOT / "data" / "cli.py"]
