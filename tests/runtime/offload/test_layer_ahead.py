"""Probes name the experts of the next layer: they learn as torch's own optimizer does, in an engine, and are kept."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, one_hot

from data.models.model import load_model
from data.traces.trace import TokenBatch
from runtime.engine.engine import Engine
from runtime.offload.layer_ahead import MOST_TOKENS
from runtime.offload.linear_probe import EPSILON, LEAST_TOKENS, MOMENTUM, RATE, SQUARES, LinearProbe, normalised
from runtime.offload.probe_file import PROBES
from tests.conftest import small_switch, write_switch
from tests.helpers.budgets import budget
from tests.helpers.predictors import untrained
from tests.helpers.processes import on_ranks
from tests.helpers.small_qwen3 import write_qwen3

CPU = torch.device("cpu")
SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def test_a_probe_learns_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    probe, linear = LinearProbe(6, 5, CPU), torch.nn.Linear(6, 5)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    adam = torch.optim.Adam(linear.parameters(), RATE / 6, (MOMENTUM, SQUARES), EPSILON)
    for _ in range(30):
        features, experts = torch.randn(16, 6, generator=generator), torch.randint(5, (16,), generator=generator)
        probability = probe.probability(features)
        torch.testing.assert_close(probability, linear(features).softmax(-1))
        probe.learn(features, probability, one_hot(experts, 5).float())
        adam.zero_grad()
        cross_entropy(linear(features), experts).backward()
        adam.step()
    assert probe.steps == 30


def test_few_tokens_are_learned_from_together():
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(20, 6, generator=generator), one_hot(torch.arange(20) % 5, 5).float()
    probes = [LinearProbe(6, 5, CPU), LinearProbe(6, 5, CPU)]
    for some in torch.arange(20).split(3):
        assert probes[0].steps == (some[0] >= LEAST_TOKENS)
        probes[0].learn(features[some], probes[0].probability(features[some]), target[some])
    probes[1].learn(features[:18], probes[1].probability(features[:18]), target[:18])
    torch.testing.assert_close(*(probe.probability(features) for probe in probes))


def test_a_probe_takes_a_state_whole_or_not_at_all():
    probe, features = LinearProbe(6, 5, CPU), torch.ones(2, 6)
    state = {"weight": torch.ones(7, 5), "square": torch.ones(7, 5), "steps": torch.tensor([3])}
    before = probe.probability(features)
    for wrong in ({"square": torch.full((7, 5), -1.0)}, {"square": torch.full((7, 5), torch.nan)}, {"steps": None}):
        with pytest.raises(ValueError, match="expected"):
            probe.restore({name: value for name, value in (state | wrong).items() if value is not None})
        torch.testing.assert_close(probe.probability(features), before)
    probe.learn(features, before, torch.eye(5)[:2])  # two tokens, which wait
    probe.restore(state)
    probe.learn(torch.ones(14, 6), torch.full((14, 5), 0.2), torch.eye(5)[[0] * 14])
    assert probe.steps == 3


def test_a_token_that_was_dropped_has_no_part():
    features = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    probes = [LinearProbe(6, 5, CPU), LinearProbe(6, 5, CPU)]
    target = one_hot(torch.tensor([1, 2, 3, 0] * 4), 5).float()
    target[2] = 0
    probes[0].learn(features, probes[0].probability(features), target)
    features[2] = 100
    probes[1].learn(features, probes[1].probability(features), target)
    torch.testing.assert_close(*(probe.probability(features[:2]) for probe in probes))


def test_normalised_rows_have_root_mean_square_1():
    rows = normalised(torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(rows, torch.tensor([[3.0, -4.0], [0.0, 0.0]]) / 12.5**0.5, atol=1e-3, rtol=0)


@pytest.fixture
def small_predictor(switch_folder, tmp_path):
    return untrained(switch_folder, tmp_path / "predictor")


def prompts(number: int = 4) -> TokenBatch:
    ids = torch.randint(4, 60, (number, 9), generator=torch.Generator().manual_seed(1))
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))


def writes(rank: int, folder: str, experts: int, times: int) -> tuple[bool, float, int]:
    """Whether all ranks write the plain model's text, how surely the last layer's experts are named, and steps."""
    tokens = prompts()
    with Engine(folder, num_redundant_experts=0, device_memory=budget(experts)) as engine:
        layer = engine.replicated.probes.layers[-1]
        texts = [engine.generate(tokens, **SETTINGS) for _ in range(times)]
        sure: list[float] = []
        learn = layer.probe.learn

        def noted(features: torch.Tensor, probability: torch.Tensor, target: torch.Tensor) -> None:
            sure.append(float((probability * target).sum() / target.sum().clamp(min=1)))
            learn(features, probability, target)

        layer.probe.learn = noted
        texts.append(engine.generate(tokens, **SETTINGS))
        return all(torch.equal(text, texts[0]) for text in texts), sum(sure) / len(sure), layer.probe.steps


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_names_the_experts_of_text_that_it_has_written_before(switch_folder, world):
    for found in on_ranks(world, writes, str(switch_folder), 4, 12):
        assert isinstance(found, tuple), found
        same, sure, steps = found
        assert same
        tokens = 13 * 11 * 4 // world  # of every step but the first, which no hidden state comes before
        assert steps == tokens // LEAST_TOKENS
        assert sure > 0.6  # at random 1 / 8 of a token's probability is on its expert


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A model with two MoE layers in each stack."""
    folder = write_switch(tmp_path_factory.mktemp("deep"))
    sparse = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    small_switch(num_layers=4, num_decoder_layers=4, **sparse).save_pretrained(folder)
    return folder


def test_each_layer_is_forecast_once_and_a_step_s_first_layer_twice(deep_folder):
    with Engine(str(deep_folder), device_memory=budget(4)) as engine:
        told: dict[int, list[float]] = {}
        cache = engine.replicated.cache
        foresee = cache.foresee
        cache.foresee = lambda layer, load: (told.setdefault(layer, []).append(load.sum()), foresee(layer, load))
        engine.generate(prompts(), **SETTINGS)
    assert told.keys() == {1, 2, 3}  # none before an encoder's first layer
    assert told[1] == pytest.approx([4 * 9], abs=0.01)
    assert told[2] == pytest.approx([4] * 24, abs=0.01)  # a token of each sequence, in twelve steps
    assert told[3] == pytest.approx([4] * 12, abs=0.01)


def test_a_pass_of_many_tokens_is_left_to_the_forecast_of_the_batch(deep_folder):
    with Engine(str(deep_folder), device_memory=budget(4)) as engine:
        engine.generate(prompts(28), **SETTINGS)
        learned = [layer.probe.steps for layer in engine.replicated.probes.layers]
        assert learned[1] == 1  # 252 tokens of the encoder
        engine.generate(prompts(29), **SETTINGS)
        assert [layer.probe.steps for layer in engine.replicated.probes.layers] == [0, 1, 2 * 11, 2 * 12]
    assert MOST_TOKENS == 256


def test_the_first_step_after_a_long_prompt_is_forecast_from_its_last_positions(switch_folder, tmp_path):
    write_qwen3(tmp_path, switch_folder)
    with Engine(str(tmp_path), device_memory="1MiB") as engine:
        engine.generate(prompts(30), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        learned = [layer.probe.steps for layer in engine.replicated.probes.layers]
    assert learned == [1] * len(learned)  # of the step, and none of the prompt


def test_probes_are_kept_in_the_predictor_s_folder(switch_folder, small_predictor):
    with Engine(str(switch_folder), str(small_predictor), device_memory=budget(4)) as engine:
        engine.generate(prompts(), **SETTINGS)
        path, state = engine.save_probes(small_predictor), engine.replicated.probes.state()
    assert path == small_predictor / PROBES
    with Engine(str(switch_folder), str(small_predictor), device_memory=budget(4)) as engine:
        found = engine.replicated.probes.state()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert any(value.float().abs().max() > 0 for value in state.values())


def test_probes_that_are_damaged_or_of_another_model_are_refused(switch_folder, small_predictor):
    open_engine = lambda: Engine(str(switch_folder), str(small_predictor), device_memory=budget(4))  # noqa: E731
    with open_engine() as engine:
        path = engine.save_probes(small_predictor)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    refused = open_engine()
    with pytest.raises(ValueError, match=rf"{PROBES} is not a safetensors file: .*; delete the file"), refused:
        pass
    path.unlink()
    with refused:  # the model was given back and the budget freed
        refused.generate(prompts(), **SETTINGS)
    path.write_bytes(whole)
    state = load_file(path)
    save_file(state, path, {"fingerprint": "another"})
    with (
        pytest.raises(ValueError, match=rf"{PROBES} was learned with another model \(fingerprint another\)"),
        open_engine(),
    ):
        pass
    fingerprint = engine.loaded.layout.fingerprint()
    save_file(state | {"layer_1.weight": torch.zeros(3, 3)}, path, {"fingerprint": fingerprint})
    with (
        pytest.raises(ValueError, match=rf"{PROBES}: layer_1: weight is \(3, 3\), expected finite numbers"),
        open_engine(),
    ):
        pass
    path.unlink()
    with Engine(str(switch_folder)) as engine, pytest.raises(ValueError, match="set device_memory"):
        engine.save_probes(small_predictor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_text_within_a_budget_is_the_plain_model_s_on_a_gpu(switch_folder):
    tokens, plain = prompts(), load_model(str(switch_folder)).model.to("cuda")
    expected = plain.generate(tokens.input_ids.to("cuda"), attention_mask=tokens.mask.long().to("cuda"), **SETTINGS)
    memory = {"device_memory": budget(4), "host_memory": budget(16)}
    with Engine(str(switch_folder), device="cuda", dtype="float32", **memory) as engine:
        for _ in range(3):
            assert torch.equal(engine.generate(tokens, **SETTINGS), expected)
        assert engine.replicated.probes.layers[-1].probe.steps == 3 * 11 * 4 // LEAST_TOKENS
        assert engine.replicated.cache.report()["device"]["prefetches"] > 0
