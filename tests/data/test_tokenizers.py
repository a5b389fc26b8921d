"""Tokenizers that do not fit their model: collecting works, or ends in one line that says what is wrong."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from data.collect import collect
from data.models.model import LoadedModel, load_model
from data.text.batching import BatchingConfig
from data.text.source import TextSource
from data.traces.store import open_trace
from runtime.engine.engine import Engine
from runtime.infer.text import text_batches
from tests.conftest import TEXTS, small_switch
from tests.helpers.small_qwen3 import write_qwen3

BATCHING = BatchingConfig(batches=3, smallest=2, largest=4, length=24)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"{text} [CITY]" for text in TEXTS))
    return str(path)


@pytest.fixture
def folder(switch_folder, tmp_path):
    return shutil.copytree(switch_folder, tmp_path / "model")


def edited(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_more_tokens(folder):
    """Adds a token to a folder's tokenizer and cuts the embedding table to the tokens there were."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    small_switch(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.add_tokens(["[CITY]"])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.parametrize("decode", ["teacher", "none", "generate"])
def test_a_token_without_embedding_ends_in_one_line(folder, text, tmp_path, decode):
    tokens = with_more_tokens(folder)
    expected = (
        rf"the text has the token {tokens - 1}, but .* has {tokens - 1} embeddings, its tokenizer {tokens} tokens"
    )
    with pytest.raises(ValueError, match=expected):
        collect(str(folder), tmp_path / "trace", text, decode=decode, batching=BATCHING)
    assert not (tmp_path / "trace").exists()
    with Engine(str(folder)) as engine, pytest.raises(ValueError, match=expected):
        list(text_batches(engine, TextSource(text), BATCHING, 3))


def test_a_decoder_only_model_with_a_small_embedding_ends_in_one_line(switch_folder, text, tmp_path):
    folder = write_qwen3(tmp_path / "qwen3", switch_folder)
    loaded = load_model(str(folder))
    loaded.model.resize_token_embeddings(200)
    small = LoadedModel(loaded.model, loaded.tokenizer, loaded.layout)
    with pytest.raises(
        ValueError, match=r"the text has the token 250, but .* has 200 embeddings, its tokenizer \d+ tok"
    ):
        small.check_ids(torch.tensor([[3, 199]]), torch.tensor([[250]]))
    small.check_ids(torch.tensor([[3, 199]]))


def test_more_tokens_than_embeddings_do_not_matter_where_no_text_has_them(folder, tmp_path):
    with_more_tokens(folder)
    path = tmp_path / "words.txt"
    path.write_text("\n".join(TEXTS))
    assert collect(str(folder), tmp_path / "trace", str(path), batching=BATCHING).num_batches == 3


@pytest.mark.parametrize("decode", ["teacher", "none", "generate"])
def test_a_tokenizer_without_end_is_refused_in_one_line(folder, text, tmp_path, decode):
    edited(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        ValueError, match=r"the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_c"
    ):
        collect(str(folder), tmp_path / "trace", text, decode=decode, batching=BATCHING)


def test_a_decoder_only_model_needs_no_end(switch_folder, text, tmp_path):
    folder = write_qwen3(tmp_path / "qwen3", switch_folder)
    settings = json.loads((switch_folder / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert collect(str(folder), tmp_path / "trace", text, batching=BATCHING).num_batches == 3


@pytest.mark.parametrize("decode", ["teacher", "none", "generate"])
def test_without_a_padding_id_zero_is_taken(switch_folder, folder, text, tmp_path, decode):
    edited(folder, "config.json", pad_token_id=None)
    edited(folder, "generation_config.json", pad_token_id=None)
    options = {"decode": decode, "batching": BATCHING, "max_new_tokens": 4}
    ours = collect(str(folder), tmp_path / "ours", text, **options)
    theirs = collect(str(switch_folder), tmp_path / "theirs", text, **options)
    assert (ours.loads() == theirs.loads()).all()


def test_a_decoder_starts_with_its_start_token_even_if_that_is_zero(folder, text, tmp_path):
    edited(folder, "config.json", pad_token_id=7, decoder_start_token_id=0)
    collect(str(folder), tmp_path / "trace", text, batching=BATCHING)
    for trace in open_trace(tmp_path / "trace").traces():
        assert not trace.decoder_tokens.input_ids[:, 0].any()
