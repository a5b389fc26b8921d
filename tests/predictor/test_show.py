"""`python -m predictor.show`: tables from config.json, and its mistakes."""

import json
import sys

import pytest
import torch

from predictor import show
from predictor.checkpoint import CONFIG, save_predictor
from predictor.evaluation.scores import Scores
from predictor.forecast import forecast_from_load
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS, VOCABULARY


@pytest.fixture
def trained(tmp_path, layout):
    """A predictor folder with a made-up test: one batch, three forecasters."""
    load = torch.arange(1, 3 * EXPERTS + 1).view(3, EXPERTS).numpy()
    rows = {}
    for name, guess in (("last", load + 5.0), ("learned", load * 1.0), ("adaptive", load * 1.0)):
        scores = Scores(milliseconds=[1.0])
        scores.add(forecast_from_load(guess, made_at=1, source=name), load, 1)
        rows[name] = scores.details()
    about = {
        "metrics": {"steady": rows},
        "segments": {},
        "provenance": {"training_seconds": 1, "training_cpu_seconds": 2},
    }
    network = LoadNetwork(layout, Architecture(width=8))
    learned = NeuralForecaster(layout, network, torch.zeros(VOCABULARY, layout.d_model), torch.ones(2, 3, 3))
    save_predictor(tmp_path / "p", learned, about)
    return tmp_path / "p"


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["show", *map(str, words)])
    show.main()


def test_shows_folders_side_by_side(trained, monkeypatch, capsys):
    command(monkeypatch, f"ours={trained}", f"theirs={trained}")
    out = capsys.readouterr().out
    assert "| forecaster | steady |" in out
    assert "| ours | SRU 8 x 2, both directions |" in out
    assert "| steady | theirs | 0.000 | 0.000 | 0.000 |" in out
    assert "| theirs, adaptive | 0.000" in out


def test_mistakes_are_one_line(trained, monkeypatch, capsys):
    config = json.loads((trained / CONFIG).read_text())
    for words, message in (
        ([], "folders"),
        ([trained, trained], "two folders have the name 'learned'"),
        ([trained.parent / "nothing"], "is not a folder"),
    ):
        with pytest.raises(SystemExit):
            command(monkeypatch, *words)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (trained / CONFIG).write_text(json.dumps(config | {"metrics": {}}))
    with pytest.raises(SystemExit):
        command(monkeypatch, trained)
    assert "has no test results" in capsys.readouterr().err


def test_help_names_the_folders(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "--help")
    assert "[NAME=]FOLDER" in capsys.readouterr().out
