"""The whole engine on a pretended CUDA device: outputs equal the plain model's, which computes on the host."""

import copy

import pytest
import torch

from data.models.layout import MoELayout
from data.models.model import load_model
from data.traces.trace import TokenBatch
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from tests.helpers.batches import batches, blank_rows, left_padded
from tests.helpers.budgets import budget
from tests.helpers.cuda_models import on_cuda
from tests.helpers.forecasters import Noise

DEVICES, REDUNDANT = 8, 8
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def assert_outputs_equal(engine: Engine, plain, stream: list[ModelBatch], atol: float = 1e-5) -> list:
    """Runs a stream of batches; every output is the plain model's, which computes on the host."""
    outputs = list(engine.run(iter(stream)))
    for batch, output in zip(stream, outputs, strict=True):
        real = batch.decoder.mask.cpu()
        assert output.logits.device == torch.device("cuda", 0)
        plain_batch = ModelBatch(on_host(batch.tokens), on_host(batch.decoder))
        torch.testing.assert_close(output.logits.cpu()[real], forward(plain, plain_batch)[real], rtol=0, atol=atol)
    return outputs


def on_host(tokens: TokenBatch) -> TokenBatch:
    return TokenBatch(tokens.input_ids.cpu(), tokens.mask.cpu())


def moves(outputs: list) -> int:
    return sum(output.stats.preparation.moves for output in outputs if output.stats.preparation)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_stay_while_replicas_move_over_8_devices(counts, switch, dtype, atol):
    plain = copy.deepcopy(switch.model).to(dtype)
    with Engine(on_cuda(switch, dtype), Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        outputs = assert_outputs_equal(engine, plain, batches(), atol)
        assert moves(outputs) > 0
        assert not engine.controller.fallbacks


def test_forecasts_come_from_the_network_of_a_predictor_folder(counts, switch_folder, predictor_folder):
    plain = load_model(str(switch_folder)).model
    with Engine(switch_folder, predictor_folder, DEVICES, REDUNDANT, dtype="float32") as engine:
        outputs = assert_outputs_equal(engine, plain, batches())
        assert engine.controller.fallbacks == {}
    prepared = [output.stats.preparation for output in outputs if output.stats.preparation]
    assert prepared
    assert {preparation.forecast.source for preparation in prepared} == {"adaptive"}
    assert moves(outputs) > 0


@pytest.mark.parametrize("stream", [[blank_rows()], [left_padded(batch) for batch in batches(3)]])
def test_unusual_padding(counts, switch, stream):
    with Engine(on_cuda(switch), Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        assert_outputs_equal(engine, switch.model, stream)


@pytest.mark.parametrize("decoder", [True, False])
def test_token_batches_that_lie_on_the_device(counts, switch, predictor_folder, decoder):
    moved = [ModelBatch(to_cuda(batch.tokens), to_cuda(batch.decoder) if decoder else None) for batch in batches(2)]
    with Engine(on_cuda(switch), predictor_folder, DEVICES, REDUNDANT) as engine:
        outputs = list(engine.run(iter(moved)))
        assert engine.controller.fallbacks == {}
    for batch, output in zip(batches(2), outputs, strict=True):
        part = batch if decoder else ModelBatch(batch.tokens)
        real = (part.decoder or part.tokens).mask
        torch.testing.assert_close(output.logits.cpu()[real], forward(switch.model, part)[real], rtol=0, atol=1e-5)


def to_cuda(tokens: TokenBatch) -> TokenBatch:
    return TokenBatch(tokens.input_ids.to("cuda"), tokens.mask.to("cuda"))


def test_greedy_text_is_identical_also_with_new_placements_on_the_way(counts, switch):
    tokens = batches(1)[0].tokens
    plain = switch.model.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **GREEDY)
    with Engine(on_cuda(switch), Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        for replan_every in (None, 2):
            assert torch.equal(engine.generate(tokens, replan_every=replan_every, **GREEDY).cpu(), plain)


def test_greedy_text_from_tokens_on_the_device(counts, switch):
    tokens = batches(1)[0].tokens
    plain = switch.model.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **GREEDY)
    with Engine(on_cuda(switch), Noise(switch.layout), DEVICES, REDUNDANT) as engine:
        assert torch.equal(engine.generate(to_cuda(tokens), **GREEDY).cpu(), plain)


def test_a_plain_call_of_the_model_inside_the_engine(counts, switch):
    batch = batches(1)[0]
    with Engine(on_cuda(switch), Noise(switch.layout), DEVICES, REDUNDANT) as engine, torch.inference_mode():
        (_,) = engine.run([batch])
        ours = forward(engine.loaded.model, batch)
    torch.testing.assert_close(ours.cpu(), forward(switch.model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("experts", [3, 12])
def test_experts_within_a_memory_budget(counts, switch_folder, experts):
    plain = load_model(str(switch_folder)).model
    memory = {"device_memory": budget(experts), "host_memory": budget(experts + 2), "dtype": "float32"}
    with Engine(switch_folder, Noise(MoELayout.from_model(plain, "random")), **memory) as engine:
        outputs = assert_outputs_equal(engine, plain, batches())
        tokens = batches(1)[0].tokens
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.mask.long()}
        assert torch.equal(engine.generate(tokens, **GREEDY).cpu(), plain.generate(**inputs, **GREEDY))
    counters = outputs[-1].stats.tiers
    assert counters["device"]["demands"] + counters["device"]["prefetches"] > 0
