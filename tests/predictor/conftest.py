"""Fixtures of the predictor's tests: a made-up trace, its model, and `train.py` run on them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from data.models.layout import MoELayout
from data.traces.trace import TokenBatch
from tests.helpers.made_up_trace import make_batch, make_layout, time_splits, write_trace
from tests.helpers.models import write_table


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Path:
    """The folder of a model that consists of an embedding table alone."""
    return write_table(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def layout(host) -> MoELayout:
    return make_layout(str(host))


@pytest.fixture(scope="session")
def trace(tmp_path_factory, layout) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace"), layout, time_splits(24, 6, 8))


@pytest.fixture
def upcoming() -> TokenBatch:
    return make_batch(0, "steady", "test", np.random.default_rng(1)).tokens


ROOT = Path(__file__).parents[2]
WANDB = ["WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SILENT", "WANDB_CONSOLE"] + [
    f"WANDB_{kind}_DIR" for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT")
]


@pytest.fixture
def arguments(trace, layout) -> list[str]:
    """A short run on the made-up trace."""
    smoke = str(ROOT / "configs" / "smoke.yaml")
    return ["train.py", "--config", smoke, f"--data.trace={trace}", f"--data.model={layout.model_id}",
            "--trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, arguments):
    """Runs `train.py` in an empty folder; returns the last line of stdout, parsed. `run.stderr` is what it printed."""

    def call(*more):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        for name in WANDB:  # set by main; a first setenv makes pytest remove them at the end
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        train.main()
        captured = capsys.readouterr()
        call.stderr = captured.err
        return json.loads(captured.out.splitlines()[-1])

    return call
