"""Predictors of decoder-only models: K experts a token, tables of their own, context, and tokens not written yet."""

import json
import sys

import numpy as np
import pytest
import torch

from data.convert import convert
from data.datamodule import RouterTraceModule
from data.models.layout import MoELayout
from data.shell import typed
from data.traces.dataset import TraceSamples, as_decode, sequence_loads
from data.traces.loads import share_of, total_variation
from data.traces.requests import ordered, requests_of, serve, step_trace
from data.traces.trace import UNKNOWN, TokenBatch
from predictor.baselines.history import Ema
from predictor.baselines.own_past import OwnPast
from predictor.baselines.token_table import TokenTable
from predictor.checkpoint import load_predictor, save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from predictor.training.losses import distillation_loss, load_loss, sequence_loss, token_loss
from tests.helpers.made_up_requests import LAYERS, TOP_K, VOCABULARY, write_recording
from tests.helpers.made_up_trace import make_layout
from tests.predictor.conftest import ROOT


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    return convert(write_recording(folder / "r.npz"), folder / "trace", slots=4, chunk=16)


@pytest.fixture(scope="module")
def batches(stored):
    return list(stored.traces())


def network_of(layout, **changes) -> LoadNetwork:
    torch.manual_seed(0)
    return LoadNetwork(layout, Architecture(**{"width": 8, "depth": 1} | changes)).eval()


def forecaster_of(layout) -> NeuralForecaster:
    network = network_of(layout)
    with torch.no_grad():
        network.unknown.normal_()
    return NeuralForecaster(layout, network, None, torch.full((2, LAYERS, 3), 0.5))


def test_each_computed_token_counts_k_times_and_context_not_at_all(stored, batches):
    learned, history = forecaster_of(stored.layout), stored.loads()[:3]
    for trace in batches[:8]:
        forecast = learned.forecast(trace.tokens, history)
        assert np.allclose(forecast.tokens, TOP_K * trace.tokens.num_tokens, rtol=1e-4)
    assert any(trace.tokens.context is not None for trace in batches[:8])


def test_context_and_the_rest_of_the_prompt_are_read(stored, batches):
    learned = forecaster_of(stored.layout)
    trace = next(trace for trace in batches if trace.tokens.context is not None)
    tokens, base = trace.tokens, learned.forecast(trace.tokens, None).share
    for place in (tokens.context, tokens.computed):
        changed = torch.where(place, (tokens.input_ids + 1) % VOCABULARY, tokens.input_ids)
        other = TokenBatch(changed, tokens.mask, tokens.context, tokens.requests)
        assert not np.allclose(learned.forecast(other, None).share, base)
    context_cut = TokenBatch(*(value[:, :] for value in (tokens.input_ids, tokens.mask)), tokens.context)
    assert np.array_equal(learned.forecast(context_cut, None).share, base), "requests do not matter to a network"


def test_unwritten_tokens_are_forecast_from_what_is_written(stored, batches):
    learned = forecaster_of(stored.layout)
    trace = next(trace for trace in batches if trace.tokens.context is not None)
    hidden = trace.tokens.unwritten()
    forecast = learned.forecast(hidden, None)
    assert np.allclose(forecast.tokens, TOP_K * trace.tokens.num_tokens, rtol=1e-4)
    other = TokenBatch((trace.tokens.input_ids + 1) % VOCABULARY, trace.tokens.mask, trace.tokens.context)
    changed = torch.where(trace.tokens.computed, other.input_ids, trace.tokens.input_ids)
    same = TokenBatch(changed, trace.tokens.mask, trace.tokens.context).unwritten()
    assert np.array_equal(learned.forecast(same, None).share, forecast.share), "it must not see what comes"
    with pytest.raises(ValueError, match="token id -2 has no row in the table of 48 embeddings"):
        learned.forecast(TokenBatch(hidden.input_ids - 1, hidden.mask, hidden.context), None)


def test_an_encoder_has_no_unwritten_tokens():
    layout = make_layout("m")
    learned = NeuralForecaster(layout, network_of(layout), torch.zeros(60, 16), torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="token id -1 has no row"):
        learned.forecast(TokenBatch(torch.full((1, 2), UNKNOWN), torch.ones(1, 2, dtype=torch.bool)))


def test_a_training_batch_becomes_a_decode_step(stored, batches):
    rng = np.random.default_rng(0)
    for trace in batches:
        step = as_decode(trace, rng)
        assert (step.phase, len(step.segments)) == ("decode", len(trace.segments))
        assert (step.tokens.computed.sum(1) >= 1).all()
        last = step.tokens.mask.sum(1) - 1
        assert step.tokens.computed[torch.arange(len(last)), last].all(), "nothing behind what is not written"
        ids, routed = step.upcoming.input_ids, step.tokens.computed
        assert (ids[routed] == UNKNOWN).all()
        assert torch.equal(
            ids[step.tokens.mask & ~routed] >= 0, torch.ones(int((step.tokens.mask & ~routed).sum())) > 0
        )
        width = step.tokens.mask.shape[1]
        assert torch.equal(step.experts[:, routed], trace.experts[:, :, :width][:, routed])
        assert sequence_loads(step, stored.layout).sum() == LAYERS * TOP_K * step.tokens.num_tokens


def test_shares_of_decode_steps_in_training(stored):
    data = RouterTraceModule(stored.path, decode=0.5)
    data.setup()
    samples = list(TraceSamples(data.trace, data.loads, data.sizes, "train", 5, lambda: 0, 4, decode=data.decode))
    made = [sample.trace.phase == "decode" for sample in samples]
    assert 0.2 < np.mean(made) < 0.8
    for sample in samples:
        assert int(sample.load.sum()) == LAYERS * TOP_K * sample.trace.tokens.num_tokens
    with pytest.raises(ValueError, match="decode is 2, expected a share of training batches, 0 to 1"):
        RouterTraceModule(stored.path, decode=2)


def test_losses_agree_with_a_plain_loop(stored, batches):
    trace, network = batches[1], network_of(stored.layout)
    tokens = trace.tokens
    prediction = network(network.embed(tokens.input_ids, None), tokens.mask, torch.zeros(0, 2, 8), tokens.computed)
    log_share = prediction.token_logits.log_softmax(-1)
    found = [
        -log_share[row, place, layer, expert]
        for layer in range(LAYERS)
        for row, place in tokens.computed.nonzero().tolist()
        for expert in trace.experts[layer, row, place].tolist()
    ]
    assert torch.allclose(token_loss(prediction, trace), torch.stack(found).mean(), atol=1e-5)
    assert sequence_loss(prediction, trace) == 0
    assert load_loss(prediction.load[LAYERS:], prediction.load[LAYERS:]) == 0
    with pytest.raises(ValueError, match="no likeliest experts to distil from; collect one with --top 4"):
        distillation_loss(prediction, trace)


def test_the_token_table_counts_each_of_a_tokens_experts(stored, batches):
    table = TokenTable(stored.layout, batches, Ema())
    trace = next(trace for trace in batches if trace.tokens.context is not None)
    forecast = table.forecast(trace.tokens, stored.loads()[:1])
    assert np.allclose(forecast.tokens, TOP_K * trace.tokens.num_tokens, rtol=1e-4)
    route, real = table.route(trace.tokens), trace.tokens.computed
    assert torch.equal(route[:, real].sort(-1).values, trace.experts[:, real].long().sort(-1).values)
    hidden = table.forecast(trace.tokens.unwritten(), stored.loads()[:1]).share
    assert np.allclose(hidden, table.table_LVE[:, 0], atol=1e-5), "the mean share for tokens that are not known"


def test_own_past_follows_each_request(stored):
    served = serve(ordered(requests_of(stored), "shuffled"), slots=4, chunk=4)
    steps = [step_trace(number, step) for number, step in enumerate(served)]
    loads = [sequence_loads(step, stored.layout).numpy() for step in steps]
    own = OwnPast(TOP_K)
    total = np.stack([load.sum(0) for load in loads])
    errors: dict[str, list[float]] = {"own": [], "ema": []}
    for step in range(1, len(steps)):
        forecasts = {"own": own.forecast(steps[step].tokens, total[:step]), "ema": Ema().forecast(None, total[:step])}
        assert np.allclose(forecasts["own"].tokens, TOP_K * steps[step].tokens.num_tokens)
        for name, forecast in forecasts.items():
            errors[name].append(float(total_variation(forecast.share, share_of(total[step])).mean()))
        own.observe(steps[step].tokens, total[step], loads[step])
    assert np.mean(errors["own"]) < np.mean(errors["ema"])
    assert len(own._row) <= 4, "requests that left are forgotten"
    assert own.forecast(None, total[:3]).source == "own", "without tokens the average, under its own name"


def test_a_predictor_with_its_own_table_needs_no_host(stored, batches, tmp_path):
    learned, layout = forecaster_of(stored.layout), stored.layout
    save_predictor(tmp_path / "p", learned)
    for loaded in (load_predictor(tmp_path / "p"), load_predictor(tmp_path / "p", layout, torch.zeros(3, 3))):
        forecasts = [one.forecast(batches[1].tokens.unwritten(), stored.loads()[:2]) for one in (learned, loaded)]
        assert np.array_equal(forecasts[0].share, forecasts[1].share)
    facts = {field: getattr(layout, field) for field in layout.__dataclass_fields__}
    for change, message in (
        ({"experts_per_token": 3}, r"experts per token 3, not 2\); train a predictor for it"),
        ({"family": "olmoe"}, "family olmoe, not recording"),
        ({"num_experts": 16}, "experts 16, not 8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor(tmp_path / "p", MoELayout(**facts | change))


def test_train_and_simulate(stored, tmp_path, monkeypatch, capsys):
    import train
    from runtime.simulate.__main__ import main as simulate

    monkeypatch.chdir(tmp_path)
    words = ["train.py", "--config", str(ROOT / "configs" / "smoke.yaml"), f"--data.trace={stored.path}"]
    words += ["--predictor", str(tmp_path / "p"), "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    printed = capsys.readouterr()
    line = json.loads(printed.out.splitlines()[-1])
    assert set(line["test"]) == {"prefill", "unseen"}
    assert {"last", "ema", "own", "token_table", "learned", "adaptive", "oracle"} <= set(line["test"]["unseen"])
    assert line["test"]["prefill"]["oracle"]["token_top1"] == 1.0
    following = typed(f"python -m runtime.simulate {stored.path} --predictor {tmp_path / 'p'}")
    assert f"Next: {following}" in printed.err
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["layout"]["experts_per_token"] == TOP_K
    given = [str(stored.path), "--predictor", str(tmp_path / "p"), "--devices", "2", "--redundant", "2"]
    given += ["--planner", "home", "--split", "quota", "--expert_bytes", "1e6", "--tokens_per_second", "1e5"]
    given += ["--link_bytes_per_second", "1e9", "--expert_overhead_tokens", "1", "--out", str(tmp_path / "s")]
    for options in (["prefill", "--chunk", "8"], ["decode", "--slots", "6", "--order", "shuffled"]):
        forecasts = "last,ema,own,learned,adaptive,oracle"
        monkeypatch.setattr(sys, "argv", ["simulate", *given, "--forecast", forecasts, "--serve", *options])
        simulate()
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        errors = {result["forecast"]: result["load_tv"] for result in report["results"]}
        assert list(errors) == forecasts.split(",")
        assert errors["oracle"] == 0 < min(error for name, error in errors.items() if name != "oracle")
    for options, message in (
        (["--serve", "decode", "--chunk", "4"], "chunk is 4, but a decode step computes one token"),
        (["--serve", "prefill", "--stream", "noise"], "stream 'noise' has no requests"),
        (["--serve", "prefill", "--slots", "0"], "slots is 0, expected 1 or more"),
        (["--forecast", "own"], "forecast own needs requests"),
    ):
        monkeypatch.setattr(sys, "argv", ["simulate", *given, *options])
        with pytest.raises(SystemExit) as stop:
            simulate()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
