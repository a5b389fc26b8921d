"""A predictor on the hub: uploaded as the folder that it is, loaded by its id. The hub's calls are replaced."""

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi

from data.models.weights import ModelWeights
from predictor import load_predictor
from predictor.checkpoint import CONFIG, WEIGHTS, save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.hub import upload_predictor
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS


@pytest.fixture
def learned(layout, host) -> NeuralForecaster:
    torch.manual_seed(0)
    table = ModelWeights(str(host)).read("shared.weight").float()
    return NeuralForecaster(layout, LoadNetwork(layout, Architecture(width=8)), table, torch.ones(2, 3, 3))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the hub's repository owner/name."""
    repository = tmp_path / "hub"

    def upload(self, *, repo_id, folder_path, allow_patterns, **_):
        assert repo_id == "owner/name"
        repository.mkdir()
        for name in allow_patterns:
            if (folder_path / name).exists():
                shutil.copy(folder_path / name, repository)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, revision=None, **_):
        if repo_id != "owner/name" or revision not in (None, "v1"):
            raise OSError("Repository Not Found")
        return str(repository)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


def test_an_uploaded_predictor_comes_back(learned, upcoming, hub, tmp_path):
    save_predictor(tmp_path / "p", learned)
    (tmp_path / "p" / "report.html").touch()
    assert upload_predictor(tmp_path / "p", "owner/name") == "https://huggingface.co/owner/name/commit/1"
    assert {file.name for file in hub.iterdir()} == {CONFIG, WEIGHTS}
    past = np.ones((2, 3, EXPERTS), dtype=int)
    for revision in (None, "v1"):
        loaded = load_predictor("owner/name", revision=revision)
        assert np.array_equal(loaded.forecast(upcoming, past).share, learned.forecast(upcoming, past).share)


def test_a_saved_folder_comes_back(learned, upcoming, tmp_path):
    save_predictor(tmp_path / "p", learned)
    loaded = load_predictor(str(tmp_path / "p"))
    assert np.array_equal(loaded.forecast(upcoming).share, learned.forecast(upcoming).share)
    with pytest.raises(ValueError, match=r"the embedding table is \(3, 2\)"):
        load_predictor(tmp_path / "p", embedding=torch.zeros(3, 2))


def test_an_id_that_the_hub_does_not_have_is_refused(hub):
    with pytest.raises(
        ValueError, match=r"owner/other is not a folder, and the .* hub did not provide it \(Repository"
    ):
        load_predictor("owner/other")


@pytest.mark.parametrize("place", [Path("owner/name"), "nothing", "a/b/c", "./owner/name", "../name"])
def test_what_is_neither_folder_nor_id_is_refused(place):
    with pytest.raises(ValueError, match=r"is not a folder; expected a predictor written by .* or the hub id 'owner"):
        load_predictor(place)
