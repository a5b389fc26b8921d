"""The training command on a made-up trace: its contract, what it prints, resuming, Ctrl-C, two processes."""

import json
import logging
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from data.shell import typed
from data.traces.store import open_trace
from predictor.checkpoint import CONFIG, WEIGHTS, load_predictor
from predictor.evaluation.scores import Scores
from predictor.training.module import ForecasterModule
from predictor.training.run_log import RunLog

ROOT = Path(__file__).parents[3]
FORECASTERS = {"uniform", "stationary", "last", "ema", "token_table", "learned", "adaptive", "oracle"}


def test_contract_and_folder(run, layout, trace, upcoming):
    line = run("--trainer.max_epochs=6", "--model.learning_rate=0.02")
    assert set(line) == {"predictor", "trace", "seconds", "validation", "test"}
    assert line["validation"].keys() == {"adaptive", "last", "ema"}
    assert line["trace"] == str(trace)
    assert set(line["test"]) == {"steady", "every_1"}
    for rows in line["test"].values():
        assert set(rows) >= FORECASTERS
        assert all(set(row) == set(Scores().reported()) for row in rows.values())
        assert rows["oracle"]["load_tv"] == rows["oracle"]["regret_r16"] == 0.0
        assert rows["last"]["balancedness_r8"] <= rows["last"]["balancedness_r16"] <= 1.0
    changing = line["test"]["every_1"]
    assert changing["learned"]["load_tv"] < min(changing[name]["load_tv"] for name in ("last", "ema", "stationary"))
    folder = Path(line["predictor"])
    assert {file.name for file in Path(f"{folder}.run").iterdir()} == {"best.ckpt", "last.ckpt", "train.log"}
    printed = [text for text in run.stderr.splitlines() if "━" not in text]
    assert len(printed) <= 15
    assert printed[0] == f"training; checkpoints and log are in {folder}.run"
    assert printed[1] == f"trace {trace}: {open_trace(trace).num_batches} batches"
    counted = sum(rows["oracle"]["batches"] for rows in json.loads((folder / CONFIG).read_text())["metrics"].values())
    assert printed[3].startswith(f"On {counted} held-out batches; balancedness: 16 replica slots on 8 devices")
    assert printed[4].split()[-4:] == ["balancedness", "(1", "is", "best)"]
    names = ["adaptive", "learned", "last", "ema", "token_table", "oracle"]
    assert [row.split()[0] for row in printed[5:11]] == names, "the names that options and files use"
    assert printed[-1] == "Next: " + typed(f"python -m runtime.infer --model {layout.model_id} --predictor {folder}")
    assert "`Trainer.fit` stopped" in Path(f"{folder}.run", "train.log").read_text()
    assert {"model.safetensors", "config.json", "run.yaml", "README.md", "report.html"} <= {
        f.name for f in folder.iterdir()
    }
    config = json.loads((folder / CONFIG).read_text())
    assert config["metrics"]["every_1"]["learned"]["load_tv"] == changing["learned"]["load_tv"]
    assert config["provenance"]["command"][0] == "train.py"
    assert config["validation"] == line["validation"]
    settings = (folder / "run.yaml").read_text()
    assert "learning_rate: 0.02" in settings
    assert "overwrite" not in settings, "the file repeats the run, and must not replace a predictor unasked"
    assert layout.fingerprint() in (folder / "README.md").read_text()
    assert load_predictor(folder, layout).forecast(upcoming, torch.zeros(0, 3, 8).numpy()).source == "learned"


@pytest.fixture
def stop_in(monkeypatch):
    """Makes training raise an error at the beginning of an epoch; undone at the end and with `stop_in(None)`."""
    begin, on_interrupt = ForecasterModule.on_train_epoch_start, signal.getsignal(signal.SIGINT)

    def choose(epoch, error=KeyboardInterrupt):
        def start(self):
            if self.current_epoch == epoch:
                raise error

        monkeypatch.setattr(ForecasterModule, "on_train_epoch_start", start if epoch is not None else begin)

    yield choose
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores further ones


def test_resuming_ends_where_an_unbroken_run_does(run, stop_in, capsys):
    whole = Path(run("--predictor=whole")["predictor"])
    stop_in(1)
    with pytest.raises(SystemExit) as stop:
        run("--predictor=resumed")
    assert stop.value.code == 130
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"interrupted; go on with: {typed('python train.py')} --config ")
    assert printed.endswith(" --predictor=resumed --ckpt_path last\n")
    assert not Path("resumed").exists()
    stop_in(0)
    with pytest.raises(SystemExit):
        run("--predictor=resumed")
    printed = capsys.readouterr().err
    assert "resumed.run holds checkpoints of an unfinished run; this run starts anew" in printed
    assert printed.endswith("interrupted; run the same command again\n"), "no checkpoint is this run's own"
    stop_in(None)
    resumed = Path(run("--predictor=resumed", "--ckpt_path=last")["predictor"])
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


def test_help_begins_with_what_most_runs_need(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    first = capsys.readouterr().out.partition("All options:")[0]
    assert first.startswith("Trains a predictor of next-batch expert load")
    assert len(first.splitlines()) < 25
    for option in ("predictor", "overwrite", "data.model", "trainer.max_epochs", "config", "ckpt_path"):
        assert f" --{option} " in first


def test_messages_of_libraries_go_to_the_log_file(tmp_path, capsys):
    with RunLog() as log:
        logging.getLogger("lightning.pytorch").info("before")
        log.write_to(tmp_path / "x.run" / "train.log")
        warnings.warn("after", UserWarning, stacklevel=1)
        logging.getLogger("predictor.training").info("shown")
    assert capsys.readouterr().err == "shown\n"
    written = (tmp_path / "x.run" / "train.log").read_text()
    assert all(word in written for word in ("before", "after", "shown"))


def test_a_run_stops_early_where_validation_gets_no_better(run, monkeypatch):
    epochs = []
    monkeypatch.setattr(ForecasterModule, "on_train_epoch_start", lambda self: epochs.append(self.current_epoch))
    run("--trainer.max_epochs=12", "--model.learning_rate=1e-12")
    assert len(epochs) <= 5, "nothing is learned: at most three more validations after the first"


def test_two_processes_train_one_predictor(tmp_path, arguments):
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments[1:], *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
    assert Path(tmp_path / json.loads(done.stdout)["predictor"]).is_dir()
