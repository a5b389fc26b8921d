"""Predictors that need no training."""

from pathlib import Path

import torch

from data.models.model import load_model
from predictor.checkpoint import save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork


def untrained(model: Path, folder: Path, seed: int = 0) -> Path:
    """Writes an untrained predictor of a model."""
    torch.manual_seed(seed)
    loaded = load_model(str(model))
    network = LoadNetwork(loaded.layout, Architecture(width=8, depth=1))
    spread, table = torch.zeros(2, loaded.layout.num_layers, 3), loaded.model.get_input_embeddings().weight
    save_predictor(folder, NeuralForecaster(loaded.layout, network, table, spread))
    return folder
