"""Span corruption loses nothing: input and target together give the text back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.text.span_corruption import corrupt

SENTINELS = np.arange(1000, 1032)
EOS = 1


def restored(source: np.ndarray, target: np.ndarray) -> list[int]:
    """Puts each sentinel's span back in its place."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= 1000:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [token for kept in source[:-1].tolist() for token in spans.get(kept, [kept])]


@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_input_and_target_give_the_text_back(length, seed):
    ids = np.arange(100, 100 + length)
    source, target = corrupt(ids, SENTINELS, EOS, np.random.default_rng(seed))
    assert source[-1] == target[-1] == EOS
    assert restored(source, target) == ids.tolist()
    assert len(source) <= length + 1


def test_fifteen_percent_in_spans_of_three():
    _, target = corrupt(np.arange(100, 300), SENTINELS, EOS, np.random.default_rng(0))
    assert (target < 1000).sum() - 1 == 30
    assert (target >= 1000).sum() == 10


def test_one_token_is_left_alone():
    source, target = corrupt(np.array([7]), SENTINELS, EOS, np.random.default_rng(0))
    assert source.tolist() == [7, EOS]
    assert target.tolist() == [EOS]
