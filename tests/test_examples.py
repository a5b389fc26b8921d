"""The scripts in examples/ run as they stand."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.models.model import load_model
from data.models.weights import BUNDLED
from predictor.checkpoint import save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from runtime.balancing.plan_file import load_plan

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with arguments; returns what it printed."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_balance_a_model(run):
    printed = run("balance_a_model").splitlines()
    assert [line.split(",")[0] for line in printed[:6]] == ["logits (2"] * 6
    assert float(printed[5].split("balancedness ")[1]) > float(printed[0].split("balancedness ")[1])


def test_plan_from_loads(run, tmp_path):
    loads = np.tile(np.arange(1, 33), (6, 2, 1))
    np.save(tmp_path / "loads.npy", loads)
    printed = run("plan_from_loads", tmp_path / "loads.npy", tmp_path / "plan.json").splitlines()
    assert len(printed) == 5
    assert float(printed[-1].split()[3].rstrip(",")) > 0.99
    plan = load_plan(tmp_path / "plan.json").plan
    assert plan.phy2log.shape == (2, 48)
    assert plan.num_devices == 8


def test_forecast_in_your_engine(run, tmp_path):
    switch = load_model(BUNDLED)
    torch.manual_seed(0)
    network = LoadNetwork(switch.layout, Architecture(width=16, depth=1))
    table, spread = switch.model.shared.weight.detach(), torch.ones(2, switch.layout.num_layers, 3)
    save_predictor(tmp_path, NeuralForecaster(switch.layout, network, table, spread))
    printed = run("forecast_in_your_engine", tmp_path).splitlines()
    assert printed[0].startswith("expected tokens of each expert: (4, 64)")
    assert len(printed) == 6
