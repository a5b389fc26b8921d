"""Tokens in the order of their experts, on the host and as a device does it, against a plain loop."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.experts.dispatch import _on_device, _on_host

EXPERTS = 5
CHOICES = st.lists(st.tuples(st.integers(0, EXPERTS), st.booleans()), min_size=1, max_size=40)


@pytest.mark.parametrize("how", [_on_host, _on_device])
@pytest.mark.parametrize("all_needed", [False, True])
@given(chosen=CHOICES)
def test_equals_a_plain_loop(how, all_needed, chosen):
    one_hot = torch.zeros(len(chosen), EXPERTS, dtype=torch.int64)
    for token, (expert, _) in enumerate(chosen):
        if expert < EXPERTS:  # else dropped
            one_hot[token, expert] = 1
    needed = None if all_needed else torch.tensor([flag for _, flag in chosen])
    tokens, counts = how(one_hot, needed)
    expected = [
        [token for token, (chose, flag) in enumerate(chosen) if chose == expert and (flag or all_needed)]
        for expert in range(EXPERTS)
    ]
    assert tokens.tolist()[: sum(map(len, expected))] == list(chain.from_iterable(expected))
    assert counts[0].tolist() == [len(each) for each in expected]
    assert counts[1].tolist() == [sum(chose == expert for chose, _ in chosen) for expert in range(EXPERTS)]
