"""What a user types first works, or ends in one sentence that says what to do."""

import copy
import json

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
    asked = {"inputs": inputs["input_ids"]} if given == "ids alone" else inputs
    expected = model.generate(**asked, max_new_tokens=8)
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


@pytest.mark.parametrize(
    ("own", "given", "keywords"),
    [
        ({"eos_token_id": "early"}, None, {"eos_token_id": None}),
        ({"eos_token_id": "early"}, {"eos_token_id": 399}, {}),
        ({"eos_token_id": "early"}, {}, {}),
        ({"eos_token_id": "early"}, {"eos_token_id": 399}, {"eos_token_id": ["early", 1]}),
        ({"num_beams": 3, "num_return_sequences": 2}, None, {}),
        ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}, {}),
        ({"do_sample": False, "num_beams": 3}, {}, {"num_return_sequences": 2}),
        ({"num_beams": 3, "num_return_sequences": 2}, None, {"num_return_sequences": 3}),
    ],
)  # fmt: skip
def test_keyword_object_and_the_models_own_settings_hold_in_transformers_order(model, inputs, own, given, keywords):
    early = int(model.generate(**inputs, max_new_tokens=4)[0, 2])  # a token that it writes early

    def filled(settings):
        return json.loads(json.dumps(settings).replace('"early"', str(early)))

    for name, value in filled(own).items():
        setattr(model.generation_config, name, value)
    asked = {"generation_config": None if given is None else GenerationConfig(max_new_tokens=12, **filled(given))}
    asked |= filled(keywords) | ({"max_new_tokens": 12} if given is None else {})
    expected = model.generate(**inputs, **asked)
    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        assert torch.equal(engine.generate(**inputs, **asked), expected)
        assert torch.equal(engine.generate(**inputs, **asked, replan_every=2), expected)


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
        run = engine.run([inputs, None, inputs])
        next(run)  # which must not end with the batch that is None, as if nothing followed
        with pytest.raises(TypeError, match="got a NoneType, expected what a tokenizer returns"):
            next(run)
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


def test_padding_in_front_of_decoder_tokens_is_not_attended_to(model, inputs):
    decoder = {"decoder_input_ids": torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]]),
               "decoder_attention_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])}  # fmt: skip
    expected = model(**inputs, **decoder).logits
    with Engine(model, num_devices=4) as engine:
        (output,) = engine.run([{**inputs, **decoder}])
    real = decoder["decoder_attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected[real], rtol=0, atol=1e-5)


def test_ignored_labels_become_padding_as_in_transformers(model, inputs):
    model.config.pad_token_id, model.config.decoder_start_token_id = 1, 0
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 3, 4, -100]])
    expected = model(**inputs, labels=labels).logits
    with Engine(model, num_devices=4) as engine:
        (output,) = engine.run([{**inputs, "labels": labels}])
    tokens = ModelBatch.of({**inputs, "labels": labels}, model.config).decoder.input_ids
    assert tokens.tolist() == [[0, 1, 1, 5], [0, 1, 3, 4]]
    assert output.logits.shape == expected.shape


def test_generate_keeps_what_else_a_mapping_holds(model, inputs):
    given = {**inputs, "decoder_input_ids": torch.tensor([[0, 5], [0, 7]])}
    expected = model.generate(**given, max_new_tokens=5)
    with Engine(model, num_devices=4) as engine:
        assert torch.equal(engine.generate(given, max_new_tokens=5), expected)
        assert torch.equal(engine.generate(**given, max_new_tokens=5), expected)


def test_ids_without_a_mask_are_all_real_as_in_transformers(model):
    ids = torch.tensor([[5, 0, 7, 0], [9, 8, 0, 0]])
    expected = model.generate(ids, max_new_tokens=6)
    with Engine(model, num_devices=4) as engine:
        assert torch.equal(engine.generate(ids, max_new_tokens=6), expected)


def test_batches_may_be_made_with_the_engine(model, inputs):
    with Engine(model, num_devices=4) as engine:
        made = ({**inputs, "decoder_input_ids": engine.generate(**inputs, max_new_tokens=3)} for _ in range(3))
        assert len(list(engine.run(made))) == 3


def test_a_source_that_raises_loses_no_batch_and_leaves_the_model_exact(model, inputs):
    plain, start = copy.deepcopy(model), torch.zeros(2, 1, dtype=torch.int64)

    def source():
        for _ in range(4):
            yield inputs
        raise OSError("no more text")

    with Engine(model, Ema(), num_devices=4, num_redundant_experts=8) as engine:
        outputs = engine.run(source())
        for _ in range(4):
            next(outputs)
        with pytest.raises(OSError, match="no more text"):
            next(outputs)
        inside = model(**inputs, decoder_input_ids=start).logits
    torch.testing.assert_close(inside, plain(**inputs, decoder_input_ids=start).logits, rtol=0, atol=1e-5)


def test_a_run_ends_with_its_engine(model, inputs):
    engine = Engine(model, num_devices=4)
    with engine:
        outputs = engine.run([inputs] * 3)
        next(outputs)
    with engine, pytest.raises(RuntimeError, match="the engine was closed while its batches were running"):
        next(outputs)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": [[5, 400]]}, "token ids are 5 to 400, expected 0 to 399"),
        ({"input_ids": [[5, -1]]}, "token ids are -1 to 5"),
        ({"input_ids": torch.tensor([[0.5, 2.0]])}, "input_ids have dtype torch.float32, expected whole numbers"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]]}, "attention_mask holds other values than 0 and 1"),
        ({"input_ids": [[5, 6]], "labels": [[5], [6]]}, "1 sequences, but decoder tokens of 2"),
    ],
)
def test_batches_that_make_no_sense_are_refused(model, batch, expected):
    with Engine(model, num_devices=4) as engine, pytest.raises((TypeError, ValueError), match=expected):
        list(engine.run([batch]))


def test_one_batch_in_place_of_many_is_explained(model, inputs):
    with Engine(model, num_devices=4) as engine, pytest.raises(TypeError, match=r"write run\(\[batch\]\)"):
        engine.run(inputs)
    with pytest.raises(TypeError, match="predictor is Ema, expected a folder, a hub id, or a Forecaster"):
        Engine(model, Ema)
