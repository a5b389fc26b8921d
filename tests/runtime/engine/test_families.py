"""In every family the engine's logits and text are the plain model's, and the model is afterwards what it was.

The plain model runs its own loop over experts ("eager"). Forecasts are noise and replicas are placed at random.
"""

import copy

import numpy as np
import pytest
import torch

from data.models.model import LoadedModel
from data.traces.trace import TokenBatch, pad_tokens
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from tests.helpers.families import FAMILIES, PAGE, VOCABULARY, page, tiny
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner

DEVICES, REDUNDANT = 4, 8


pytestmark = pytest.mark.usefixtures("one_thread")


def left_padded(tokens: TokenBatch) -> TokenBatch:
    """The same sequences with their padding in front."""
    rows = [row[mask] for row, mask in zip(tokens.input_ids, tokens.mask, strict=True)]
    ids = torch.stack([torch.nn.functional.pad(row, (tokens.mask.shape[1] - len(row), 0)) for row in rows])
    return TokenBatch(ids, tokens.mask.flip(1))


def right_padded(sizes: tuple[int, ...], seed: int) -> TokenBatch:
    rng = np.random.default_rng(seed)
    return pad_tokens([rng.integers(3, VOCABULARY, size) for size in sizes], pad=0)


def stream() -> list[ModelBatch]:
    """Padding behind, in front and none, one token in all, and a sequence of nothing but padding."""
    ragged = [right_padded((9, 4, 1), 0), right_padded((3, 17), 1)]
    blank = right_padded((6, 5), 2)
    blank.mask[1] = False
    whole = [right_padded((1,), 3), right_padded((20, 20), 4), blank]
    return [ModelBatch(tokens) for tokens in (*ragged, *map(left_padded, ragged), *whole, ragged[0])]


def largest_difference(engine: Engine, plain) -> float:
    """Between logits of real tokens, over all batches."""
    worst = 0.0
    for batch, output in zip(stream(), engine.run(stream()), strict=True):
        real = batch.tokens.mask[output.rows].to(output.logits.device)
        theirs = forward(plain, batch)[output.rows]
        if real.any():
            worst = max(worst, float((output.logits[real] - theirs[real]).abs().max()))
        assert output.stats.load.sum() == output.stats.device_load.sum()
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_text_are_the_plain_models(family):
    model = tiny(family)
    loaded, plain = LoadedModel.of(model), copy.deepcopy(model)
    prompt = left_padded(right_padded((7, 3, 5), 5))
    settings = {"attention_mask": prompt.mask.long(), "max_new_tokens": 6, "do_sample": False}
    written = plain.generate(prompt.input_ids, **settings)
    settings["eos_token_id"] = int(written[0, -4])  # so that sequences end at different steps
    expected = plain.generate(prompt.input_ids, **settings)
    with Engine(loaded, Noise(loaded.layout), DEVICES, REDUNDANT) as engine:
        engine.controller.planner = RandomPlanner(engine.home)
        assert largest_difference(engine, plain) <= 1e-5
        ids = engine.generate(prompt.input_ids, replan_every=2, **settings)
        assert torch.equal(ids, expected)
        assert not np.array_equal(engine.replicated.transfer.plan.phy2log, engine.home.phy2log), "no replica was placed"
    with Engine(loaded, None, 1) as engine:
        assert largest_difference(engine, plain) <= 1e-5
    assert model.get_experts_implementation() == plain.get_experts_implementation()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [1, DEVICES])
def test_logits_and_text_are_the_plain_models_on_a_gpu(family, devices):
    model = tiny(family).to("cuda")
    if family == "minimax":  # torch 2.11 refuses the mask that transformers gives to its attention on CUDA
        model.set_attn_implementation("eager")
    loaded, plain = LoadedModel.of(model), copy.deepcopy(model)
    prompt = left_padded(right_padded((7, 3, 5), 5))
    settings = {"max_new_tokens": 6, "do_sample": False}
    mask = prompt.mask.long()
    expected = plain.generate(prompt.input_ids.to("cuda"), attention_mask=mask.to("cuda"), **settings)
    with Engine(loaded, Noise(loaded.layout), devices, 0 if devices == 1 else REDUNDANT) as engine:
        engine.controller.planner = RandomPlanner(engine.home)
        assert largest_difference(engine, plain) <= 1e-4  # products of float32 are summed in another order
        assert torch.equal(engine.generate(prompt.input_ids, attention_mask=mask, **settings), expected)


def test_the_table_of_families_is_what_the_command_writes():
    assert len(FAMILIES) >= 20
    assert page() == PAGE.read_text(), "run python -m tests.helpers.families"


def test_without_a_mask_padding_is_what_transformers_takes_for_it():
    model = tiny("mixtral")
    prompt = left_padded(right_padded((7, 3, 5), 5))
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = copy.deepcopy(model).generate(prompt.input_ids, **settings)
    assert not torch.equal(expected, model.generate(prompt.input_ids, attention_mask=prompt.mask * 0 + 1, **settings))
    with Engine(model, None, DEVICES, 0) as engine:
        assert torch.equal(engine.generate(prompt.input_ids, **settings), expected)
        assert torch.equal(engine.generate({"input_ids": prompt.input_ids}, position_ids=None, **settings), expected)


@pytest.mark.parametrize("name", ["position_ids", "past_key_values", "inputs_embeds"])
def test_what_a_batch_cannot_hold_is_refused(name):
    ids = torch.arange(3, 9)[None]
    with Engine(tiny("mixtral"), None, DEVICES, 0) as engine, pytest.raises(ValueError, match=f"^{name} was given"):
        list(engine.run([{"input_ids": ids, name: ids}]))
