import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from runtime.simulate.job import Job
from runtime.simulate.sweep import grid, recordings, sweep
from runtime.simulate.workers import WorkerLostError, results
from tests.helpers import jobs as functions
from tests.runtime.simulate.test_command import refuse, simulate

RECORDED = Path(__file__).parents[1] / "recorded"
WITH_RAY = pytest.param("local", marks=pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed"))
TIMED = ("plan_ms", "split_us")
QUICK = {"forecast": "last,oracle", "steps": 6, "expert_bytes": 1e6, "tokens_per_second": 1e6,
         "link_bytes_per_second": 1e10, "expert_overhead_tokens": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings, one of them in a folder of its own, beside a file that is none."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "inner").mkdir()
    loads = np.random.default_rng(0).zipf(1.4, (8, 2, 12)).clip(max=500)
    np.savez(folder / "a.npz", counts=loads)
    np.save(folder / "inner" / "b.npy", loads[:, :, ::-1])
    (folder / "notes.txt").write_text("not loads")
    return folder


def steady(report):
    """The results without the times that were measured."""
    return [{name: value for name, value in result.items() if name not in TIMED} for result in report["results"]]


def reports(out):
    kept = [json.loads(path.read_text())["report"] for path in (out / "jobs").iterdir()]
    return {(report["loads"], report["redundant"]): steady(report) for report in kept}


def test_a_grid_has_a_job_for_each_recording_and_combination(folder):
    given = {"devices": "4,6", "redundant": "0,12", "max_moves": None, "tokens_per_step": "64, 1e3", "gpu": None}
    made = grid(folder, given)
    assert len(made) == 2 * 2 * 2 * 2
    assert {job.loads.name for job in made} == {"a.npz", "b.npy"}
    assert [(job.devices, job.redundant, job.tokens_per_step) for job in made[:3]] == [
        (4, 0, 64.0), (4, 0, 1000.0), (4, 12, 64.0)
    ]  # fmt: skip


def test_a_recording_in_parts_is_one_recording(tmp_path):
    shutil.copy(RECORDED / "dsv2lite.npz", tmp_path / "a.npz")
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "expert_distribution_recorder_1.pt").touch()
    (tmp_path / "sglang" / "expert_distribution_recorder_2.pt").touch()
    assert recordings(tmp_path) == [tmp_path / "a.npz", tmp_path / "sglang"]
    assert recordings(tmp_path / "sglang") == [tmp_path / "sglang"]


@pytest.mark.parametrize("ray", [None, WITH_RAY])
def test_workers_find_what_one_process_finds(folder, tmp_path, ray):
    given = {**QUICK, "devices": 4, "redundant": "4,8,9", "max_moves": None, "tokens_per_step": None, "gpu": None}
    made = grid(folder, given)
    report = sweep(made, tmp_path, processes=2, ray=ray)
    assert [(Path(row["loads"]).name, row["redundant"], "refused" in row) for row in report["rows"]] == [
        (name, redundant, redundant == 9) for name in ("a.npz", "b.npy") for redundant in (4, 8, 9)
    ]
    assert "9 redundant experts do not divide over 4 devices" in report["rows"][2]["refused"]
    alone = {(str(job.loads), job.redundant): steady(job.run()) for job in made if job.redundant != 9}
    assert reports(tmp_path) == alone
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_sweep_goes_on_where_it_was_left(folder, tmp_path, caplog):
    given = {**QUICK, "devices": 4, "redundant": "4,8", "max_moves": None, "tokens_per_step": None, "gpu": None}
    made = grid(folder / "a.npz", given)
    sweep(made[:1], tmp_path, processes=1)
    report = sweep(made, tmp_path, processes=1)
    assert report["resumed"] == 1
    kept = sorted((tmp_path / "jobs").glob("*.json"))
    kept[0].write_text(kept[0].read_text()[:300])
    kept[1].write_text("{}")
    again = sweep(made, tmp_path, processes=1)
    assert again["resumed"] == 0
    assert caplog.text.count("was edited or cut short; its job is done again") == 2
    assert sweep(made, tmp_path, processes=1)["resumed"] == 2
    other = Job(**{**QUICK, "loads": folder / "a.npz", "devices": 4, "redundant": 4, "steps": 5})
    assert other.identity != made[0].identity


@pytest.mark.parametrize("ray", [None, WITH_RAY])
def test_the_job_of_a_lost_worker_is_done_again(tmp_path, ray):
    given = [(str(tmp_path), number) for number in range(3)]
    assert sorted(results(functions.killed_once, given, processes=2, ray=ray)) == [(n, n) for n in range(3)]


@pytest.mark.parametrize("ray", [None, WITH_RAY])
def test_what_a_job_raises_is_raised(ray):
    with pytest.raises(ValueError, match="3 is odd"):
        list(results(functions.refuses, [3], processes=1, ray=ray))


def test_workers_that_are_always_lost_end_the_sweep():
    with pytest.raises(WorkerLostError, match=r"lost 3 times with 2 jobs left .*use fewer --jobs"):
        list(results(functions.always_killed, [1, 2], processes=2))


def test_the_command_prints_a_row_for_each_job(folder, tmp_path, monkeypatch, capsys):
    options = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", value)]
    arguments = [folder / "a.npz", *options, "--devices", "4", "--redundant", "4,8", "--jobs", 1, "--out", tmp_path]
    report = simulate(monkeypatch, capsys, *arguments)
    assert [row["answer"] for row in report["rows"]] == ["not enough data"] * 2
    assert report["varied"] == ["redundant"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--devices", "8,many"],
            "devices is '8,many', expected a number, or numbers with commas between, such as 8,16",
        ),
        (["--redundant", "9,10"], "64 experts and 9 redundant experts do not divide over 8 devices"),
        (["--devices", "4,8", "--save-plans", "x.npz"], "--save-plans is for one recording and one setting"),
        (["--gpu", "h100_sxm,h200", "--like", "gpt_oss_20b"], "gpu: unknown 'h200'; choose from a100_sxm, h100_sxm"),
        (["--devices", "8,0"], "--devices is 0, expected 1 or more"),
        (["--save-plans", "."], ". is a folder, expected a file for the results; name one in it"),
        (["--devices", "3", "--redundant", "1"], "64 experts and 1 redundant experts do not divide over 3 devices"),
        (["--redundant", "8,16", "--jobs", "0"], "--jobs is 0, expected 1 or more"),
    ],
)
def test_mistakes_end_in_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    assert text in refuse(monkeypatch, capsys, RECORDED / "dsv2lite.npz", *arguments, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_recordings_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").touch()
    assert f"{tmp_path} holds no recording; expected" in refuse(monkeypatch, capsys, tmp_path)
