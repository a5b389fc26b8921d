"""Which forecaster serves: the predictor, unless past loads did better on its validation batches."""

import json
import logging
from pathlib import Path

import pytest
import torch

from predictor.adaptive import AdaptiveForecaster
from predictor.choice import better_free, open_forecaster
from predictor.forecaster import NeuralForecaster
from tests.helpers.made_up_trace import VOCABULARY, WIDTH, make_layout

V1 = Path(__file__).parent / "fixtures" / "v1"
TABLE = torch.zeros(VOCABULARY, WIDTH)


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ({"adaptive": 0.1, "last": 0.2, "ema": 0.3}, None),
        ({"adaptive": 0.2, "last": 0.2, "ema": 0.3}, "last"),
        ({"adaptive": 0.4, "last": 0.2, "ema": 0.1}, "ema"),
        ({"last": 0.2}, None),
        ({}, None),
    ],
)
def test_the_predictor_must_be_better(errors, best):
    assert better_free(errors) == best


@pytest.fixture
def folder(tmp_path):
    """A predictor folder with some load errors on its validation batches."""

    def make(**errors) -> Path:
        config = json.loads((V1 / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | ({"validation": errors} if errors else {})))
        (tmp_path / "model.safetensors").write_bytes((V1 / "model.safetensors").read_bytes())
        return tmp_path

    return make


def test_auto_takes_what_did_better_and_says_so(folder, caplog):
    layout = make_layout("made-up")
    better = open_forecaster(folder(adaptive=0.1, last=0.2, ema=0.3), "auto", layout, TABLE)
    unknown = open_forecaster(folder(), "auto", layout, TABLE)
    assert isinstance(better, AdaptiveForecaster)
    assert isinstance(unknown, AdaptiveForecaster), "a folder of an earlier version"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        worse = open_forecaster(folder(adaptive=0.25, last=0.3, ema=0.2), "auto", layout, TABLE)
    assert worse.name == "ema"
    assert "load error 0.250, ema 0.200; ema forecasts instead (forecast 'adaptive' takes the predictor)" in caplog.text


def test_a_choice_is_followed(folder):
    layout, losing = make_layout("made-up"), folder(adaptive=0.25, last=0.3, ema=0.2)
    assert isinstance(open_forecaster(losing, "adaptive", layout, TABLE), AdaptiveForecaster)
    assert isinstance(open_forecaster(losing, "learned", layout, TABLE), NeuralForecaster)
    assert open_forecaster(losing, "last", layout).name == "last"
    assert open_forecaster(None, "ema", layout).name == "ema"
    assert open_forecaster(losing, "none", layout) is open_forecaster(None, "auto", layout) is None
    with pytest.raises(ValueError, match="forecast is 'learned' without a predictor"):
        open_forecaster(None, "learned", layout)


@pytest.mark.parametrize("said", [3, {"adaptive": "low", "last": 0.1}, {"adaptive": None, "last": 0.1}, [0.1]])
def test_validation_errors_that_are_none_are_refused(folder, said):
    config = folder() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"validation": said}))
    with pytest.raises(ValueError, match=r"validation is .*, expected numbers; train the predictor again"):
        open_forecaster(config.parent, "auto", make_layout("made-up"), TABLE)
