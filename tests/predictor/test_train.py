"""The training command on a made-up trace: its contract, resuming, tracking, and a user's mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from wandb_file import records

import train
from predictor.checkpoint import CONFIG, WEIGHTS, load_predictor
from predictor.module import LoadForecaster
from predictor.scores import CONTRACT

ROOT = Path(__file__).parents[2]
FORECASTERS = {"uniform", "stationary", "last", "ema", "token_table", "learned", "oracle"}


def arguments(trace, layout, *more) -> list[str]:
    smoke = str(ROOT / "configs" / "smoke.yaml")
    return ["train.py", "--config", smoke, f"--data.trace={trace}", f"--data.model={layout.model_id}",
            "--trainer.enable_progress_bar=false", *more]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, trace, layout):
    """Runs `train.py` in an empty folder; returns the last line of stdout, parsed."""

    def call(*more):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", arguments(trace, layout, *more))
        train.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_contract_and_folder(run, layout, trace, upcoming):
    line = run("--trainer.max_epochs=6", "--model.learning_rate=0.02")
    assert set(line) == {"predictor", "trace", "seconds", "test"}
    assert line["trace"] == str(trace)
    assert set(line["test"]) == {"steady", "every_1"}
    for rows in line["test"].values():
        assert set(rows) >= FORECASTERS
        assert all(set(row) == set(CONTRACT) for row in rows.values())
        assert rows["oracle"]["load_tv"] == rows["oracle"]["regret"] == 0.0
        assert rows["last"]["balancedness_8"] <= rows["last"]["balancedness"] <= 1.0
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
    start_of_epoch = LoadForecaster.on_train_epoch_start

    def killed(self):
        if self.current_epoch == 1:
            raise RuntimeError("killed")

    monkeypatch.setattr(LoadForecaster, "on_train_epoch_start", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("--predictor=resumed")
    assert not Path("resumed").exists()
    monkeypatch.setattr(LoadForecaster, "on_train_epoch_start", start_of_epoch)
    resumed = Path(run("--predictor=resumed", "--ckpt_path=last")["predictor"])
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--nonsense=1"], "unrecognized arguments: --nonsense=1"),
        (["--model.architecture.cell=rnn"], "Expected a typing.Literal['sru', 'lstm', 'gru']"),
        (["--data.model=other/model"], "the configuration names other/model"),
        (["--data.trace=/nowhere", "--data.model=/nowhere"], "/nowhere is not a folder"),
        (["--predictor=."], ". exists and is not a predictor folder"),
        (["--ckpt_path=broken.ckpt"], "broken.ckpt is no checkpoint that can be resumed"),
    ],
)
def test_mistakes_end_with_one_line(run, tmp_path, capsys, mistake, says):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(SystemExit) as stop:
        run(*mistake)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_damaged_shard_is_named(run, tmp_path, trace, capsys):
    copy = shutil.copytree(trace, tmp_path / "copy")
    shard = sorted(copy.glob("*.parquet"))[1]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(SystemExit):
        run(f"--data.trace={copy}")
    assert shard.name in capsys.readouterr().err.splitlines()[-1]


def test_offline_run_holds_what_was_promised(run):
    """Opened with wandb's own reader: curves, settings, tables, pictures and the predictor as an artifact."""
    run("--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.save_dir=outputs",
        "--trainer.logger.offline=true", "--trainer.log_every_n_steps=1")  # fmt: skip
    wandb.teardown()  # waits until all is written
    keys, kinds, settings, artifacts = set(), {}, set(), set()
    for record in records(next(Path("outputs/wandb").glob("offline-run-*/run-*.wandb"))):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            keys.add(key)
            if key.endswith("/_type"):
                kinds[key.removesuffix("/_type")] = json.loads(item.value_json)
        settings |= {item.key or item.nested_key[0] for item in record.config.update}
        artifacts.add(record.artifact.type)
    assert keys >= {"train/token_loss", "train/load_loss", "train/gradient_norm", "val/load_tv", "lr-AdamW"}
    assert {key for key, kind in kinds.items() if kind == "table-file"} == {"tables/ladder", "tables/layers"}
    pictures = {"ladder", "calibration", "heat_steady", "heat_every_1"}
    assert {key for key, kind in kinds.items() if kind == "image-file"} == {f"pictures/{name}" for name in pictures}
    assert settings >= {"model", "data", "trainer", "seed_everything"}
    assert "predictor" in artifacts


def test_two_processes_train_one_predictor(tmp_path, trace, layout):
    command = [sys.executable, str(ROOT / "train.py")] + arguments(
        trace, layout, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"
    )[1:]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
    assert Path(tmp_path / json.loads(done.stdout)["predictor"]).is_dir()
