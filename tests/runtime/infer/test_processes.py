"""The command under torchrun: two processes answer, are interrupted, and lose one another."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TEXTS
from tests.helpers.prometheus import scrape

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start(switch_folder, predictor, tmp_path):
    """Starts the command under torchrun with two processes; stdout and stderr are files in `tmp_path`."""
    (tmp_path / "words.txt").write_text("\n".join(TEXTS * 400))
    begun = []

    def call(**changes) -> subprocess.Popen:
        options = {"model": switch_folder, "predictor": predictor, "text": tmp_path / "words.txt", "redundant": 4,
                   "batching.smallest": 3, "batching.largest": 3, "batching.batches": 100_000,
                   "metrics-file": tmp_path / "metrics.jsonl", "out": tmp_path / "out"}  # fmt: skip
        words = [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "runtime.infer",
        ]
        with (tmp_path / "stdout").open("w") as stdout, (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *torchrun, *words], stdout=stdout, stderr=stderr, cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        begun.append(process)
        return process

    yield call
    for process in begun:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.wait(40)


def lines_of(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def wait_for_first_line(process: subprocess.Popen, tmp_path: Path) -> None:
    deadline = time.monotonic() + 90
    while not ((tmp_path / "metrics.jsonl").exists() and lines_of(tmp_path)):
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        time.sleep(0.05)


def pid_of_rank(torchrun: int, rank: int) -> int:
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"torchrun has no rank {rank}")


def test_two_processes_answer_as_the_plain_model_and_rank_0_tells(start, tmp_path):
    process = start(batches=5)
    assert process.wait(120) == 0, (tmp_path / "stderr").read_text()
    report = json.loads((tmp_path / "stdout").read_text().splitlines()[-1])
    assert (report["processes"], report["devices"], report["batches"]) == (2, 2, 5)
    assert report["max_logit_difference"] <= 1e-5
    layers = [layer for line in lines_of(tmp_path) for layer in line["layers"]]
    assert len(layers) == 5 * 2
    assert all(len(layer["waited_ms"]) == len(layer["busy_ms"]) == 2 for layer in layers)
    sent, local = (sum(layer[f"tokens_{where}"] for layer in layers) for where in ("sent", "local"))
    assert sent / (sent + local) == pytest.approx(report["sent_share"])
    assert report["sent_share"] > 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["batches"] == 5


def test_an_interrupt_ends_all_processes_and_leaves_no_half_report(start, tmp_path):
    process = start(**{"batches": 100_000, "check": "false", "metrics-port": 0})
    wait_for_first_line(process, tmp_path)
    (port,) = re.findall(r"metrics: http://localhost:(\d+)/metrics", (tmp_path / "stderr").read_text())
    found = scrape(int(port))
    assert found["tokens_total", "encoder_1", "sent"] > 0
    assert {key[2] for key in found if key[0] == "waited_seconds_total"} == {"0", "1"}
    ranks = [pid_of_rank(process.pid, rank) for rank in (0, 1)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(15) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    # one rank may notice the other's end before its own interrupt, and then says that instead
    assert "interrupted; run the same command again" in (tmp_path / "stderr").read_text()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "stdout").read_text()
    assert [line["batch"] for line in lines_of(tmp_path)] == list(range(len(lines_of(tmp_path))))


def test_a_process_that_is_killed_is_named_by_the_other(start, tmp_path):
    process = start(batches=100_000, check="false")
    wait_for_first_line(process, tmp_path)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
    assert process.wait(30) != 0
    assert "error: rank 1 is lost; rank 0 stops" in (tmp_path / "stderr").read_text()
    assert not (tmp_path / "out").exists()
    assert lines_of(tmp_path)
