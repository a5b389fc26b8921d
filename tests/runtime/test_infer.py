"""The command that deploys: its contract on a real model folder and real text, and a user's mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import runtime.infer
from data.switch import load_switch
from predictor.checkpoint import save_predictor
from predictor.learned import LearnedForecaster
from predictor.model import Architecture, LoadNetwork
from tests.conftest import TEXTS, small_switch

MS = {"forecast", "plan", "move", "compute", "slowest_device", "waited", "held_up"}


@pytest.fixture
def predictor(switch_folder, tmp_path) -> Path:
    """An untrained predictor of the random model."""
    torch.manual_seed(0)
    switch = load_switch(str(switch_folder))
    network = LoadNetwork(switch.layout, Architecture(width=8, depth=1))
    spread = torch.zeros(2, switch.layout.num_layers, 2)
    save_predictor(
        tmp_path / "predictor", LearnedForecaster(switch.layout, network, switch.model.shared.weight, spread)
    )
    return tmp_path / "predictor"


@pytest.fixture
def command(switch_folder, predictor, tmp_path, monkeypatch, capsys):
    """Runs the command; returns what it wrote to stdout and stderr."""
    text = tmp_path / "words.txt"
    text.write_text("\n".join(TEXTS * 2))

    def call(**changes):
        options = {"model": switch_folder, "predictor": predictor, "text": text, "devices": 4, "redundant": 4,
                   "batches": 5, "traffic.smallest": 3, "traffic.largest": 3, "out": tmp_path / "out"}  # fmt: skip
        words = [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["infer", *words])
        runtime.infer.main()
        return capsys.readouterr()

    return call


def test_contract(command, tmp_path):
    report = json.loads(command().out.splitlines()[-1])
    assert report["batches"] == 5
    assert report["tokens"] > 0
    assert report["max_logit_difference"] <= 1e-5
    assert report["same_argmax"] == 1.0
    assert set(report["balancedness"]) == {"contiguous", "replicated", "oracle"}
    assert report["balancedness"]["contiguous"] < report["balancedness"]["oracle"]
    assert 0 < report["load_tv"] < 1
    assert report["bytes"] == report["moves"] * 2 * 32 * 48 * 4
    assert set(report["ms"]) == MS
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["each_batch"]) == 5
    assert (tmp_path / "out" / "balancedness.png").stat().st_size > 5000


def cut(folder: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(folder, tmp_path / "cut")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    return copy


def other_model(folder: Path, tmp_path: Path) -> Path:
    small_switch(seed=1).save_pretrained(tmp_path / "other")
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    return tmp_path / "other"


def test_mistakes_end_with_one_line_and_exit_code_2(command, switch_folder, predictor, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text("\n\n")
    mistakes = [
        ({"model": tmp_path / "nowhere"}, "nowhere is not a folder"),
        ({"model": cut(switch_folder, tmp_path / "m")}, "could not be loaded"),
        ({"model": other_model(switch_folder, tmp_path)}, "was trained for"),
        ({"predictor": tmp_path / "nowhere"}, "is not a folder; expected a predictor"),
        ({"predictor": cut(predictor, tmp_path / "p")}, "cut short"),
        ({"text": tmp_path / "blank.txt"}, "no usable line"),
        ({"batches": 0}, "batches is 0"),
        ({"devices": 3}, "8 experts do not divide over 3 devices"),
        ({"redundant": 6}, "6 redundant experts do not divide over 4 devices"),
        ({"redundancy": 6}, "redundancy"),
    ]
    for changes, message in mistakes:
        with pytest.raises(SystemExit) as stop:
            command(**changes)
        error = capsys.readouterr().err
        assert stop.value.code == 2, changes
        assert message in error, error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists(), changes
