"""What a training run logs to Weights & Biases: offline, read back from its file; online, through a stand-in."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from data.files import sha256
from predictor.training.wandb_logging import track_settings
from tests.helpers.wandb_file import records
from tests.predictor.conftest import ROOT

LOGGER = "--trainer.logger"
OFFLINE = [f"{LOGGER}=lightning.pytorch.loggers.WandbLogger", f"{LOGGER}.name=null", f"{LOGGER}.save_dir=outputs",
           f"{LOGGER}.offline=true", "--trainer.log_every_n_steps=1"]  # fmt: skip


def key_of(item):
    return item.key or "/".join(item.nested_key)


@pytest.fixture
def offline(run):
    """Trains, waits until W&B has written everything, returns the records of the newest run."""

    def call(*arguments):
        wandb.teardown()  # a service that another test started would write below that test's directory
        run(*OFFLINE, *arguments)
        wandb.teardown()
        files = Path("outputs/wandb").glob("offline-run-*/run-*.wandb")
        return list(records(max(files, key=lambda path: path.stat().st_mtime)))

    return call


def test_offline_run_holds_what_was_promised(offline, run, layout, trace):
    """Curves, settings, baselines, tables, pictures, test figures and the predictor; a resumed run has the same id."""
    keys, kinds, settings, artifacts, summary = [], {}, {}, set(), {}
    first = offline("--trainer.max_epochs=1")
    assert "wandb" not in run.stderr
    second = offline("--trainer.max_epochs=2", "--ckpt_path=last", "--overwrite")
    begun = [next(record.run for record in part if record.HasField("run")) for part in (first, second)]
    assert begun[0].run_id == begun[1].run_id
    assert begun[0].display_name == "predictor sru-1x32"
    for record in second:
        for item in record.history.item:
            keys.append(key_of(item))
            if keys[-1].endswith("/_type"):
                kinds[keys[-1].removesuffix("/_type")] = json.loads(item.value_json)
        settings |= {key_of(item): item.value_json for item in record.config.update}
        summary |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
        artifacts.add(record.artifact.type)
    assert set(keys) >= {"train/token_loss", "train/load_loss", "train/gradient_norm", "val/load_tv", "lr-AdamW"}
    assert not [key for key in keys if key.startswith("test/")], "no chart of a single point"
    tables = {key for key, kind in kinds.items() if kind == "table-file"}
    assert tables == {"tables/ladder", "tables/layers", "curves/load_tv_table"}
    pictures = {"ladder", "calibration", "heat_steady", "heat_every_1"}
    assert {key for key, kind in kinds.items() if kind == "image-file"} == {f"pictures/{name}" for name in pictures}
    assert {key.partition("/")[0] for key in settings} >= {"model", "data", "trainer", "seed_everything"}
    assert json.loads(settings["layout_fingerprint"]) == layout.fingerprint()
    assert json.loads(settings["trace_sha256"]) == sha256(trace / "trace.json")
    assert "git_revision" in settings
    for name in ("reference/val/load_tv/last", "reference/val/load_tv/ema", "test/steady/learned/load_tv"):
        assert 0 < summary[name] < 1
    assert any(name.startswith("test/every_1/learned/balancedness") for name in summary)
    assert "predictor" in artifacts
    state = torch.load("outputs/smoke/predictor.run/last.ckpt", weights_only=True)
    assert len(state["callbacks"]["BaselineCurve"]["errors"]) == 2, "the chart shows both parts of the run"


class Settings(dict):
    """In place of a run's configuration."""

    def update(self, settings, allow_val_change):
        super().update(settings)


class Online:
    """In place of a run with a connection: keeps the artifacts it is given."""

    offline, url = False, "https://example.org/run"

    def __init__(self) -> None:
        self.used, self.config, self.summary, self.logged = [], Settings(), {}, []

    def define_metric(self, *_, **__):
        pass

    def use_artifact(self, artifact):
        self.used.append(artifact)

    def log_artifact(self, artifact, aliases):
        self.logged.append((artifact, aliases))

    def log(self, *_):
        pass

    def finish(self):
        pass


def test_online_the_trace_is_an_input_and_the_predictor_an_output(run, trace, monkeypatch):
    online = Online()
    monkeypatch.setattr(
        "predictor.training.wandb_logging.wandb_logger", lambda trainer: SimpleNamespace(experiment=online)
    )
    folder = Path(run("--trainer.max_epochs=1")["predictor"])
    (used,) = online.used
    assert (used.type, used.name) == ("trace", trace.name)
    assert "trace.json" in used.manifest.entries
    ((logged, aliases),) = online.logged
    assert (logged.type, aliases) == ("predictor", ["latest", "best"])
    assert set(logged.manifest.entries) == {file.name for file in folder.iterdir()}
    assert "git_revision" in online.config
    assert f", curves at {online.url}" in run.stderr


def test_without_a_connection_the_run_stays_on_disk(tmp_path, monkeypatch, caplog):
    modes, online = [], Online()

    def init(**settings):
        modes.append(settings.get("mode"))
        if len(modes) == 1:
            raise wandb.errors.CommError("Timed out while retrying\nand more")
        return online

    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(wandb, "init", init)
    logger = WandbLogger(project="switchcast", save_dir=tmp_path)
    track_settings(SimpleNamespace(loggers=[logger], is_global_zero=True), {"width": 8})
    assert modes == [None, "offline"]
    assert online.config == {"width": 8}
    assert "W&B cannot be reached (Timed out while retrying); the run stays on disk" in caplog.text


def test_the_command_of_a_sweep_agent_runs(offline, arguments, monkeypatch):
    """configs/sweep.yaml as wandb's agent turns it into a command, with one choice of every parameter."""
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    first = {name: choice.get("values", [choice.get("min")])[0] for name, choice in sweep["parameters"].items()}
    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in first.items()}})["args"]
    assert set(sweep["parameters"]) == {word.removeprefix("--").split("=")[0] for word in given}
    command = create_sweep_command(sweep["command"])
    assert command[-1] == "${args}"
    filled = {"${env}": "env", "${interpreter}": "echo"}  # the shell prints what it would run
    words = [filled.get(word, word) for word in command[:-1]] + given
    environment = {**os.environ, "WANDB_RUN_ID": "abc123"}
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.split()
    assert said[0] == sweep["program"] == "train.py"
    assert "outputs/sweep/abc123" in said, "every run of the sweep has a folder of its own"
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    keys, settings = set(), {}
    for record in offline(*said[1:], "--trainer.max_epochs=1"):
        keys |= {key_of(item) for item in record.history.item}
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert sweep["metric"]["name"] in keys
    assert settings["model"]["architecture"]["width"] == first["model.architecture.width"]
