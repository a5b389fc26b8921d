"""A run keeps to text that its predictor was not trained on, or says that it does not."""

import json
from dataclasses import asdict, replace

import pytest

from data.collect import collect
from data.models.model import load_model
from data.text.batching import BatchingConfig
from data.text.source import TextSource
from predictor.checkpoint import FORMAT_VERSION
from runtime.engine.engine import Engine
from runtime.infer.text import HeldOut, held_out, text_batches
from tests.conftest import TEXTS

BATCHING = BatchingConfig(batches=12, smallest=2, largest=3, length=32)
UNKNOWN = "the predictor does not record which text it was trained on; this text may be part of it"


@pytest.fixture
def text(tmp_path):
    """Forty lines that all differ, in two files."""
    folder = tmp_path / "words"
    folder.mkdir()
    lines = [f"#{n:02d}# {TEXTS[n % 11]}" for n in range(40)]
    (folder / "a.txt").write_text("\n".join(lines[:25]))
    (folder / "b.txt").write_text("\n".join(lines[25:]))
    return folder


def predictor(folder, **about):
    folder.mkdir()
    needed = {"format_version": FORMAT_VERSION, "layout": {}, "architecture": {}, "weights_sha256": ""}
    (folder / "config.json").write_text(json.dumps(needed | about))
    return folder


def test_documents_of_training_batches_are_left_out_however_the_run_cuts_them(switch_folder, text, tmp_path):
    stored = collect(str(switch_folder), tmp_path / "trace", str(text), batching=BATCHING)
    folder = predictor(tmp_path / "predictor", trained_on=stored.trained_on)
    loaded = load_model(str(switch_folder))
    source, batching = TextSource(str(text)), replace(BATCHING, largest=2, seed=7, batches=50)
    held = held_out(folder, source, batching)
    assert held.known
    assert held.skip == stored.about["held_out_from"] > 0
    assert held.note == f"the predictor was trained on the first {held.skip} documents of this text, left out"
    with Engine(loaded, num_devices=4) as engine:
        batches = [batch for _, batch in text_batches(engine, source, batching, 50, held.skip)]
    texts = [document.text for document in TextSource(str(text)).documents()]
    found = sum(part.counts.used for part in source.parts)
    assert found == len(texts) - held.skip > 0
    assert sum(len(batch.tokens.mask) for batch in batches) >= found
    decoded = " ".join(loaded.tokenizer.batch_decode([ids for batch in batches for ids in batch.tokens.input_ids]))
    assert not [line for line in texts[: held.skip] if line[:4] in decoded]
    assert [line for line in texts[held.skip :] if line[:4] in decoded]
    assert sum(part.counts.trained_on for part in source.parts) == held.skip
    with Engine(loaded, num_devices=4) as engine, pytest.raises(ValueError, match=r"gives no batch.*40 trained on"):
        list(text_batches(engine, TextSource(str(text)), batching, 50, 40))


def test_text_that_is_partly_known_or_cut_from_another_column_is_not_held_out(text, tmp_path):
    source = TextSource(str(text))
    trained = {"text": "elsewhere", "text_column": None, "text_files": source.files, "held_out_from": 20}
    folder = predictor(tmp_path / "predictor", trained_on=trained)
    assert held_out(folder, source, BATCHING).skip == 20
    assert held_out(folder, TextSource(str(text / "a.txt")), BATCHING) == HeldOut(
        False, "the predictor was trained on this file, among others or in another column; all of it is read"
    )
    (text / "b.txt").write_text("other words")
    note = held_out(folder, TextSource(str(text)), BATCHING).note
    assert note.startswith("the predictor was trained on 1 of these 2 files, among others")
    (text / "a.txt").write_text("other words as well")
    assert held_out(folder, TextSource(str(text)), BATCHING) == HeldOut(True)
    assert held_out(folder, None, BATCHING) == HeldOut(True), "it was not trained on the offline corpus"


def test_the_offline_corpus_is_held_out_where_it_is_cut_as_in_training(text, tmp_path):
    trained = {"text": "offline corpus", "batching": asdict(BATCHING)}
    folder = predictor(tmp_path / "predictor", trained_on=trained)
    assert held_out(folder, None, BATCHING) == HeldOut(True)
    assert held_out(folder, TextSource(str(text)), BATCHING) == HeldOut(True)
    other = held_out(folder, None, replace(BATCHING, batches=4))
    assert other.known is False
    assert other.note.startswith("the predictor was trained on the offline corpus with another --batching.batches")


def test_what_is_not_recorded_is_not_claimed(text, tmp_path):
    old = predictor(tmp_path / "old")
    assert held_out(old, None, BATCHING) == held_out(old, TextSource(str(text)), BATCHING) == HeldOut(None, UNKNOWN)
    converted = predictor(tmp_path / "converted", trained_on={"text": "tokens.npz"})
    assert held_out(converted, TextSource(str(text)), BATCHING) == HeldOut(None, UNKNOWN)
    assert held_out(None, None, BATCHING) == HeldOut(None)
    edited = predictor(tmp_path / "edited", trained_on={"text": "x", "text_files": ["a"]})
    with pytest.raises(
        ValueError, match=r"edited/config.json: trained_on is .*; it was edited, train the predictor again"
    ):
        held_out(edited, None, BATCHING)
