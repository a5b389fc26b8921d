"""What a run tells Weights & Biases: offline, read back with wandb's own reader; online, to a run that writes down."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from predictor.training.wandb_logging import track_trace
from tests.helpers.wandb_file import records
from tests.predictor.conftest import ROOT


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
    assert settings >= {"model", "data", "trainer", "seed_everything", "git_revision"}
    assert "predictor" in artifacts


class Online:
    """Stands where a run with a connection would, and keeps the artifacts it is handed."""

    offline = False

    def __init__(self) -> None:
        self.used, self.config, self.summary, self.logged = [], {}, {}, []

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
    monkeypatch.setattr("predictor.training.wandb_logging._wandb", lambda trainer: SimpleNamespace(experiment=online))
    folder = Path(run("--trainer.max_epochs=1")["predictor"])
    (used,) = online.used
    assert (used.type, used.name) == ("trace", trace.name)
    assert "trace.json" in used.manifest.entries
    ((logged, aliases),) = online.logged
    assert (logged.type, aliases) == ("predictor", ["latest", "best"])
    assert set(logged.manifest.entries) == {file.name for file in folder.iterdir()}
    assert "git_revision" in online.config


def test_any_other_logger_is_left_alone(trace):
    track_trace(SimpleNamespace(loggers=[]), trace)
    offline = SimpleNamespace(offline=True)
    track_trace(SimpleNamespace(loggers=[WandbLogger(experiment=offline)]), trace)


def test_the_command_of_a_sweep_agent_runs(run, arguments, monkeypatch):
    """configs/sweep.yaml as wandb's agent turns it into a command, with one choice of every parameter."""
    sweep = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    first = {name: choice.get("values", [choice.get("min")])[0] for name, choice in sweep["parameters"].items()}
    chosen = {name: {"value": value} for name, value in first.items()}
    command = create_sweep_command(sweep["command"])
    given = create_sweep_command_args({"args": chosen})
    assert command[-1] == "${args}"
    words = [word for word in command if not word.startswith("${")] + given["args"]
    assert sweep["program"] == "train.py"
    assert set(sweep["parameters"]) == {word.removeprefix("--").split("=")[0] for word in given["args"]}
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    wandb_logger = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.save_dir=outputs"]
    run(*wandb_logger, *words, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1")
    wandb.teardown()
    keys, settings = set(), {}
    for record in records(next(Path("outputs/wandb").glob("offline-run-*/run-*.wandb"))):
        keys |= {item.key or "/".join(item.nested_key) for item in record.history.item}
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert sweep["metric"]["name"] in keys
    assert settings["model"]["architecture"]["width"] == first["model.architecture.width"]
