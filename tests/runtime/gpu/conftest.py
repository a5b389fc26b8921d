"""Pretended devices, and a predictor for the random model."""

import pytest
import torch

from data.models.model import load_model
from predictor.checkpoint import save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.pretend_cuda import pretending


@pytest.fixture
def counts():
    """One pretended device; counts what it is asked to do."""
    with pretending() as counts:
        yield counts


@pytest.fixture(scope="session")
def predictor_folder(tmp_path_factory, switch_folder):
    """A predictor as `train.py` writes it, with random weights."""
    torch.manual_seed(0)
    switch, folder = load_model(str(switch_folder)), tmp_path_factory.mktemp("predictors") / "random"
    layout = switch.layout
    network = LoadNetwork(layout, Architecture(width=8, depth=1))
    folder.mkdir()
    spread, table = torch.full((2, layout.num_layers, 3), 0.1), switch.model.shared.weight.detach()
    save_predictor(folder, NeuralForecaster(layout, network, table, spread))
    return folder
