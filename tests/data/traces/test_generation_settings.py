"""Traces of generated text are greedy and step by step, whatever a model's own settings of generation say."""

import json
import shutil

import pytest
import torch

from data.collect import collect
from data.models.model import load_model
from data.text.batching import BatchingConfig
from data.traces.store import open_trace
from tests.conftest import TEXTS
from tests.helpers.small_qwen3 import write_qwen3

BATCHING = BatchingConfig(batches=3, smallest=2, largest=4, length=24)
OWN = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.5, "top_k": 3},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "pieces": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 2.0},
    "list of ends": {"eos_token_id": [1, 5]},
    "no end": {"eos_token_id": None},
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(TEXTS))
    return str(path)


def with_settings(folder, tmp_path, **settings):
    """A copy of a model folder whose generation_config has other settings."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


def generated(folder, out, text):
    options = {"batching": BATCHING, "decode": "generate", "max_new_tokens": 6}
    return list(collect(str(folder), out, text, **options).traces())


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.tokens.input_ids, other.tokens.input_ids)
        assert torch.equal(one.decoder_tokens.input_ids, other.decoder_tokens.input_ids)
        assert torch.equal(one.experts, other.experts)
        assert torch.equal(one.decoder_experts, other.decoder_experts)


@pytest.mark.parametrize("name", OWN)
def test_traces_of_an_encoder_and_decoder(switch_folder, text, tmp_path, name):
    folder = with_settings(switch_folder, tmp_path, **OWN[name])
    assert_equal(generated(folder, tmp_path / "own", text), generated(switch_folder, tmp_path / "plain", text))


@pytest.mark.parametrize("name", OWN)
def test_traces_of_a_decoder_alone(switch_folder, text, tmp_path, name):
    plain = write_qwen3(tmp_path / "qwen3", switch_folder)
    folder = with_settings(plain, tmp_path, **OWN[name])
    assert_equal(generated(folder, tmp_path / "own", text), generated(plain, tmp_path / "plain", text))


@pytest.mark.parametrize("several", [False, True])
def test_a_sequence_is_traced_up_to_any_of_its_ends(switch_folder, text, tmp_path, several):
    (first, *_) = generated(switch_folder, tmp_path / "plain", text)
    end = int(first.decoder_tokens.input_ids[0, 1])
    folder = with_settings(switch_folder, tmp_path, eos_token_id=[399, end] if several else end)
    (trace, *_) = generated(folder, tmp_path / "own", text)
    written = load_model(str(switch_folder)).model.generate(
        first.tokens.input_ids, attention_mask=first.tokens.mask.long(), max_new_tokens=6, eos_token_id=[399, end]
    )[:, :-1]
    ended = (written[:, 1:] == end).cumsum(1) > 0
    assert ended.any(1).tolist() != [True] * len(written), "some end, some do not"
    real = torch.cat([torch.ones_like(ended[:, :1]), ~ended], 1)
    assert torch.equal(trace.decoder_tokens.mask, real)
    assert torch.equal(trace.decoder_tokens.input_ids[real], written[real])
    assert open_trace(tmp_path / "own").loads()[0, 1].sum() == real.sum()


def test_a_start_token_that_also_ends_a_text_is_traced(switch_folder, text, tmp_path):
    folder = with_settings(switch_folder, tmp_path, eos_token_id=[0, 1])
    for trace in generated(folder, tmp_path / "own", text):
        assert trace.decoder_tokens.mask[:, 0].all()
