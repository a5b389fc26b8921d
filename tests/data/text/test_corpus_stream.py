"""The default stream: what each phase promises, and nothing read twice."""

from collections import Counter

import numpy as np
import pytest

from data.models.model import load_model
from data.text.batching import BatchingConfig, time_splits
from data.text.corpus import SEGMENTS
from data.text.corpus_stream import PHASES, UNSEEN, UNSEEN_MIX, corpus_splits, corpus_stream, phase_sizes, topic_mixes
from data.text.document import Document

BASE = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("pattern", [*PHASES, "every_5"])
def test_mixes_are_shares(pattern):
    mixes = topic_mixes(pattern, BASE, 37, np.random.default_rng(0))
    assert mixes.shape == (37, 4)
    assert np.allclose(mixes.sum(1), 1)
    assert (mixes >= 0).all()


def test_topics_change_when_they_should():
    rng = np.random.default_rng(0)
    changes = {p: np.abs(np.diff(topic_mixes(p, BASE, 40, rng), axis=0)).sum(1) for p in PHASES}
    assert not changes["steady"].any()
    assert (changes["drift"] > 0).all()
    assert changes["drift"].max() < 0.5
    assert np.flatnonzero(changes["every_10"]).tolist() == [9, 19, 29]
    assert (changes["every_1"] > 1).all()


@pytest.mark.parametrize("count", [1, 5, 12, 80, 333])
def test_splits_are_in_order_with_gaps_between(count):
    splits = time_splits(count)
    assert len(splits) == count
    if count >= 12:
        assert [split for split, last in zip(splits, ["", *splits], strict=False) if split != last] == [
            "train", "gap", "val", "gap", "test",
        ]  # fmt: skip


def test_stream(switch_folder):
    """Every phase in order, unseen segments only at the end and only for testing, no sequence twice."""
    batching = BatchingConfig(batches=8, smallest=2, largest=4, length=128)
    words = [f"word{n} is number {n} of many words that follow" for n in range(3000)]
    documents = [Document(segment, f"{segment} {word}") for segment in SEGMENTS for word in words[:300]]
    tokenizer = load_model(str(switch_folder)).tokenizer
    batches = list(corpus_stream(documents, tokenizer, "none", batching))
    assert list(Counter(batch.phase for batch in batches).items()) == list(phase_sizes(batching).items())
    assert len(corpus_splits(batching)) == len(batches)
    assert [batch.number for batch in batches] == list(range(len(batches)))
    seen_twice = [row for row, times in Counter(tuple(s) for b in batches for s in b.sources).items() if times > 1]
    assert not seen_twice
    for batch, split in zip(batches, corpus_splits(batching), strict=True):
        assert 2 <= len(batch.segments) <= 4
        assert (batch.phase == UNSEEN) == (set(batch.segments) <= set(UNSEEN_MIX))
        assert split == "test" or batch.phase != UNSEEN


def test_a_segment_that_runs_dry_says_so(switch_folder):
    documents = [Document(segment, f"only document of segment {segment} with some words") for segment in SEGMENTS]
    tokenizer = load_model(str(switch_folder)).tokenizer
    with pytest.raises(ValueError, match=r"segment '.*' has no text left at batch \d+; lower --batching.batches"):
        list(corpus_stream(documents, tokenizer, "none", BatchingConfig(batches=8)))
