"""The training command on a made-up trace: its contract, resuming, stopping early, two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from predictor.checkpoint import CONFIG, WEIGHTS, load_predictor
from predictor.evaluation.scores import Scores
from predictor.training.module import ForecasterModule

ROOT = Path(__file__).parents[3]
FORECASTERS = {"uniform", "stationary", "last", "ema", "token_table", "learned", "oracle"}


def test_contract_and_folder(run, layout, trace, upcoming):
    line = run("--trainer.max_epochs=6", "--model.learning_rate=0.02")
    assert set(line) == {"predictor", "trace", "seconds", "test"}
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
    assert {"model.safetensors", "config.json", "run.yaml", "README.md", "report.html"} <= {
        f.name for f in folder.iterdir()
    }
    config = json.loads((folder / CONFIG).read_text())
    assert config["metrics"]["every_1"]["learned"]["load_tv"] == changing["learned"]["load_tv"]
    assert config["provenance"]["command"][0] == "train.py"
    assert "learning_rate: 0.02" in (folder / "run.yaml").read_text()
    assert layout.fingerprint() in (folder / "README.md").read_text()
    assert load_predictor(folder, layout).forecast(upcoming, torch.zeros(0, 3, 8).numpy()).source == "learned"


def test_resuming_ends_where_an_unbroken_run_does(run, monkeypatch):
    whole = Path(run("--predictor=whole")["predictor"])
    start_of_epoch = ForecasterModule.on_train_epoch_start

    def killed(self):
        if self.current_epoch == 1:
            raise RuntimeError("killed")

    monkeypatch.setattr(ForecasterModule, "on_train_epoch_start", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("--predictor=resumed")
    assert not Path("resumed").exists()
    monkeypatch.setattr(ForecasterModule, "on_train_epoch_start", start_of_epoch)
    resumed = Path(run("--predictor=resumed", "--ckpt_path=last")["predictor"])
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


def test_a_run_stops_early_where_validation_gets_no_better(run, monkeypatch):
    epochs = []
    monkeypatch.setattr(ForecasterModule, "on_train_epoch_start", lambda self: epochs.append(self.current_epoch))
    run("--trainer.max_epochs=12", "--model.learning_rate=1e-12")
    assert len(epochs) <= 5, "nothing is learned: three validations in vain after the first at most"


def test_two_processes_train_one_predictor(tmp_path, arguments):
    more = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments[1:], *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
    assert Path(tmp_path / json.loads(done.stdout)["predictor"]).is_dir()
