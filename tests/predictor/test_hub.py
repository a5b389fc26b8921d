"""A predictor on the hub: saved, loaded, and uploaded as the folder that it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

from data.models.weights import ModelWeights
from predictor.checkpoint import CONFIG, WEIGHTS
from predictor.forecaster import NeuralForecaster
from predictor.hub import HubForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS


@pytest.fixture
def learned(layout, host) -> HubForecaster:
    torch.manual_seed(0)
    table = ModelWeights(str(host)).read("shared.weight").float()
    network = LoadNetwork(layout, Architecture(width=8))
    return HubForecaster.of(NeuralForecaster(layout, network, table, torch.ones(2, 3, 3)))


def test_a_folder_comes_back(learned, upcoming, tmp_path):
    learned.save_pretrained(tmp_path / "p")
    loaded = HubForecaster.from_pretrained(tmp_path / "p")
    past = np.ones((2, 3, EXPERTS), dtype=int)
    assert np.array_equal(loaded.forecast(upcoming, past).share, learned.forecast(upcoming, past).share)
    with pytest.raises(ValueError, match="the embedding table is"):
        HubForecaster.from_pretrained(tmp_path / "p", embedding=torch.zeros(3, 2))


def test_uploads_weights_and_configuration(learned, monkeypatch):
    """The hub's two calls are caught; what would go there is the folder."""
    sent = {}

    def upload(self, *, repo_id, folder_path, **_):
        sent[repo_id] = {file.name for file in Path(folder_path).iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    learned.push_to_hub("owner/predictor")
    assert sent["owner/predictor"] >= {CONFIG, WEIGHTS}
