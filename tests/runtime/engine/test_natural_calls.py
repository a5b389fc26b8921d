"""What a user types first works, or ends in one sentence that says what to do."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    SwitchTransformersForConditionalGeneration,
)

from predictor.baselines.history import Ema
from runtime import Engine, ModelBatch
from runtime.engine.batch import forward
from tests.conftest import TEXTS, small_switch


@pytest.fixture
def inputs(switch_folder):
    """What the tokenizer returns, sequences of several lengths."""
    tokenizer = AutoTokenizer.from_pretrained(switch_folder)
    return tokenizer([TEXTS[0], TEXTS[1][:30]], padding=True, return_tensors="pt")


@pytest.fixture
def model():
    return small_switch()


def test_a_live_model_and_what_the_tokenizer_returns(model, inputs):
    plain = copy.deepcopy(model)
    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        outputs = list(engine.run([inputs] * 6))
    start = torch.zeros(2, 1, dtype=torch.int64)
    expected = plain(**inputs, decoder_input_ids=start).logits
    for output in outputs:
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
        assert output.stats.balancedness == pytest.approx(output.stats.layer_balancedness.mean())
    assert outputs[-1].stats.balancedness > outputs[0].stats.balancedness


def test_a_model_that_was_never_called_before_can_be_called_afterwards(switch_folder, inputs):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(switch_folder).eval()
    start = torch.zeros(2, 1, dtype=torch.int64)
    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        (output,) = engine.run([inputs])
        written = engine.generate(**inputs, max_new_tokens=4)
        inside = model(**inputs, decoder_input_ids=start).logits
    after = model(**inputs, decoder_input_ids=start).logits
    torch.testing.assert_close(output.logits, after, rtol=0, atol=1e-5)
    torch.testing.assert_close(inside, after, rtol=0, atol=1e-5)
    assert torch.equal(written, model.generate(**inputs, max_new_tokens=4))
    after.sum().backward()


def test_labels_feed_the_decoder(model, inputs):
    labels = torch.tensor([[5, 9, 11], [7, 3, -100]])
    expected = model(**inputs, labels=labels).logits
    with Engine(model, num_devices=4) as engine:
        (output,) = engine.run([{**inputs, "labels": labels}])
    real = labels != -100
    torch.testing.assert_close(output.logits[real], expected[real], rtol=0, atol=1e-5)


def test_lists_and_arrays_do_as_well(model):
    with Engine(model, num_devices=4) as engine:
        (lists,) = engine.run([{"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 0]]}])
        (arrays,) = engine.run([{"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.array([[1, 1, 0]])}])
    assert torch.equal(lists.logits, arrays.logits)


def test_the_model_can_be_called_inside_the_block(model, inputs):
    start = torch.zeros(2, 1, dtype=torch.int64)
    expected, text = model(**inputs, decoder_input_ids=start).logits, model.generate(**inputs, max_new_tokens=6)
    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        for _ in engine.run([inputs] * 3):  # replicas, and masks of the last batch, are there from here on
            pass
        again = model(**inputs, decoder_input_ids=start)
        torch.testing.assert_close(again.logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6), text)
        with pytest.raises(RuntimeError, match="compute no gradients"):
            again.logits.sum().backward()
        model.train()
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            model(**inputs, decoder_input_ids=start)
        model.eval()


@pytest.mark.parametrize("given", ["keywords", "mapping", "ids alone", "inputs"])
def test_generate_takes_what_transformers_takes(model, inputs, given):
    expected = model.generate(**inputs, max_new_tokens=8)
    with Engine(model, num_devices=4) as engine:
        written = {
            "keywords": lambda: engine.generate(**inputs, max_new_tokens=8),
            "mapping": lambda: engine.generate(inputs, max_new_tokens=8),
            "ids alone": lambda: engine.generate(inputs["input_ids"], max_new_tokens=8),
            "inputs": lambda: engine.generate(
                inputs=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8
            ),
        }[given]()
    assert torch.equal(written, expected)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(max_new_tokens=7, num_beams=3, num_return_sequences=2),
        GenerationConfig(max_new_tokens=20, eos_token_id=[17, 21]),
    ],
)
def test_settings_may_come_as_an_object(model, inputs, config):
    expected = model.generate(**inputs, generation_config=config)
    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        assert torch.equal(engine.generate(**inputs, generation_config=config), expected)
        with pytest.raises(ValueError, match="return_dict_in_generate is True"):
            engine.generate(**inputs, generation_config=GenerationConfig(return_dict_in_generate=True))


def test_mistakes_say_what_to_do(model, inputs, tmp_path):
    with pytest.raises((TypeError, ValueError), match="BertModel"):
        Engine(BertModel(BertConfig(num_hidden_layers=1, hidden_size=12)))
    with pytest.raises(ValueError, match=r"in training mode.*call model\.eval\(\) first"):
        Engine(small_switch().train())
    with pytest.raises(ValueError, match="device_memory is 1GiB, but the model is in memory already; give its folder"):
        Engine(model, device_memory="1GiB")
    with pytest.raises(ValueError, match="nowhere"):
        Engine(model, predictor=tmp_path / "nowhere")
    with Engine(model, num_devices=4) as engine:
        with pytest.raises(TypeError, match="got a str, expected what a tokenizer returns"):
            next(engine.run(["a text"]))
        with pytest.raises(ValueError, match="0 inputs were given, expected input_ids once"):
            engine.generate(max_new_tokens=4)
        with pytest.raises(ValueError, match="2 inputs were given"):
            engine.generate(inputs, input_ids=inputs["input_ids"])


def test_a_batch_without_decoder_runs_the_encoder_alone(model, inputs):
    batch = ModelBatch(inputs)
    expected = forward(copy.deepcopy(model), batch)
    with Engine(model, num_devices=4) as engine:
        (output,) = engine.run([batch])
    real = batch.tokens.mask
    torch.testing.assert_close(output.logits[real], expected[real], rtol=0, atol=1e-5)
