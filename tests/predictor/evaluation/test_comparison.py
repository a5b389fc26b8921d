"""The rivals and the measuring itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from data.datamodule import RouterTraceModule
from data.models.layout import MoELayout
from predictor.baselines.history import Ema, Oracle, Uniform
from predictor.evaluation.comparison import compare_forecasters, rivals
from predictor.evaluation.report import summarise, write_report
from predictor.evaluation.scores import Scores
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS


@pytest.fixture(scope="module")
def data(trace, layout):
    module = RouterTraceModule(trace, layout.model_id)
    module.setup()
    return module


def test_oracle_is_perfect_and_others_are_not(data):
    summaries = summarise(compare_forecasters(rivals(data), data))
    assert set(summaries) == {"steady", "every_1"}
    for rows in summaries.values():
        assert list(rows) == ["uniform", "stationary", "last", "ema", "ridge", "token_table", "oracle"]
        assert rows["oracle"] == Scores().summary() | {"load_tv": 0.0, "hot_recall": 1.0, "token_top1": 1.0}
        assert all(row["load_tv"] > 0.01 for name, row in rows.items() if name != "oracle")
    assert summaries["every_1"]["token_table"]["load_tv"] < 0.7 * summaries["every_1"]["last"]["load_tv"]
    assert summaries["steady"]["token_table"]["token_top1"] > 0.7
    assert summaries["steady"]["last"]["token_top1"] is None


def test_balancer_sees_each_stream_alone(data):
    made = []

    def new_balancer():
        calls = []
        made.append(calls)
        return lambda forecast, load, past: calls.append(len(past)) or (0.9 if forecast.source == "oracle" else 0.5)

    comparison = compare_forecasters([Uniform(3, EXPERTS), Oracle(data.loads)], data, {8: new_balancer})
    assert [len(calls) for calls in made] == [8, 8, 8, 8]
    assert made[0] == [step for step, split in enumerate(data.splits) if split == "test"][:8]
    summary = comparison["steady"]["uniform"].summary()
    assert summary["balancedness_r8"] == 0.5
    assert summary["regret_r8"] == 0.4
    assert summary["balancedness_r16"] is None
    assert comparison["steady"]["oracle"].summary()["regret_r8"] == 0.0


def test_layers_without_load_are_in_no_mean():
    """A decoder that did not run is neither forecast well nor balanced well."""
    loads = np.random.default_rng(0).integers(1, 90, (6, 2, 16))
    scores, alone = Scores(milliseconds=[1.0]), Scores(milliseconds=[1.0])
    loads[:, 1] = 0
    loads[0] = loads[0][::-1]  # once it is the other way round
    for number, load in enumerate(loads):
        scores.add(replace(Uniform(2, 16).forecast(None, loads), spread=np.full((2, 16), 0.02)), load, 1)
        carried = load[[1 if number == 0 else 0]]
        alone.add(replace(Uniform(1, 16).forecast(None, loads[:, :1]), spread=np.full((1, 16), 0.02)), carried, 1)
    found, expected = scores.details(), alone.details()
    for name in ("load_tv", "load_tv_interval", "hot_recall", "nll", "coverage_80"):
        assert found[name] == pytest.approx(expected[name])
    assert found["batches"] == 6
    assert found["load_tv_layers"][1] == pytest.approx(scores.load_tv[0][1], abs=1e-4), "one batch has load there"
    silent = Scores(milliseconds=[1.0])
    silent.add(Uniform(2, 16).forecast(None, loads), loads[1], 1)
    assert silent.details()["load_tv_layers"][1] is silent.details()["sampling_floor_layers"][1] is None
    assert "NaN" not in json.dumps(silent.details())
    layout = MoELayout("m", "", (("encoder", 0), ("decoder", 0)), 16, None, 0, 0, 0)
    of_both, of_one = (train.balancedness_of(each, 8) for each in (layout, replace(layout, layers=layout.layers[:1])))
    both = of_both(Uniform(2, 16).forecast(None, loads), loads[1], loads[1:2])
    assert both == of_one(Uniform(1, 16).forecast(None, loads[:, :1]), loads[1, :1], loads[1:2, :1]) < 1


def test_ema_picks_the_rate_that_fits():
    steady = np.random.default_rng(0).multinomial(200, np.full(8, 1 / 8), size=(40, 1))
    assert Ema.fit(steady, list(range(20, 40))).rate == 0.05
    jumps = np.eye(8, dtype=int)[np.arange(40) // 10][:, None] * 100
    assert Ema.fit(jumps, list(range(40))).rate == 0.7


def test_oracle_reads_the_step_off_the_history():
    loads = np.arange(24).reshape(3, 2, 4)
    assert np.allclose(Oracle(loads).forecast(None, loads[:2]).load, loads[2])


def test_report_holds_its_pictures(data, layout, tmp_path):
    torch.manual_seed(0)
    network = LoadNetwork(layout, Architecture(width=8))
    learned = NeuralForecaster(layout, network, torch.randn(60, layout.d_model), torch.ones(2, 3, 3))
    write_report(tmp_path, "a & b", compare_forecasters([*rivals(data), learned], data), layout.layer_names)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>a &amp; b</h1>" in page
    names = {"ladder", "calibration", "heat_steady", "heat_every_1"}
    assert {file.stem for file in tmp_path.glob("*.png")} == names
    assert page.count("data:image/png;base64,") == len(names)
