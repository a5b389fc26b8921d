"""Sorting assignments by expert, on the host and on a device, from a one-hot and from numbers, equals a plain loop."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.experts.routing import loads_by_sequence, sort_on_device, sort_on_host

EXPERTS, K = 5, 3
CHOICES = st.lists(st.tuples(st.integers(0, EXPERTS), st.booleans()), min_size=1, max_size=40)
SEVERAL = st.lists(
    st.tuples(st.lists(st.integers(0, EXPERTS - 1), min_size=K, max_size=K, unique=True), st.booleans()), max_size=20
)


def check(choice: torch.Tensor, skipped: torch.Tensor | None, chosen: list[tuple[int, bool]]) -> None:
    """Compares with the expert of each assignment, E where it is dropped, and whether it is needed."""
    expected = [
        [number for number, (chose, flag) in enumerate(chosen) if chose == expert and (flag or skipped is None)]
        for expert in range(EXPERTS)
    ]
    sizes, order = [len(each) for each in expected], list(chain.from_iterable(expected))
    assignments, counts = sort_on_host(choice, skipped, EXPERTS)
    assert assignments.tolist() == order
    assert counts[0].tolist() == sizes
    assert counts[1].tolist() == [sum(chose == expert for chose, _ in chosen) for expert in range(EXPERTS)]
    assignments, ends, left_out = sort_on_device(choice, skipped, torch.arange(EXPERTS))
    assert assignments.tolist()[: sum(sizes)] == order
    assert sorted(assignments.tolist()) == list(range(len(chosen)))
    assert ends.tolist() == np.cumsum(sizes).tolist()
    found = set() if left_out is None else set(left_out.nonzero().flatten().tolist())
    assert found == set(range(len(chosen))) - set(order)


@pytest.mark.parametrize("all_needed", [False, True])
@given(chosen=CHOICES)
def test_a_one_hot_whose_row_is_zero_where_a_token_is_dropped(all_needed, chosen):
    experts = torch.tensor([expert for expert, _ in chosen])
    one_hot = torch.nn.functional.one_hot(experts, EXPERTS + 1)[:, None, :EXPERTS]
    check(one_hot, None if all_needed else torch.tensor([not flag for _, flag in chosen]), chosen)


@pytest.mark.parametrize("all_needed", [False, True])
@given(chosen=SEVERAL)
def test_numbers_of_several_experts_for_each_token(all_needed, chosen):
    index = torch.tensor([experts for experts, _ in chosen], dtype=torch.int64).reshape(-1, K)
    skipped = None if all_needed else torch.tensor([not flag for _, flag in chosen], dtype=torch.bool)
    check(index, skipped, [(expert, flag) for experts, flag in chosen for expert in experts])


@given(chosen=SEVERAL.filter(lambda chosen: len(chosen) > 1))
def test_each_sequence_is_counted_on_its_own(chosen):
    chosen = chosen[: len(chosen) // 2 * 2]  # two sequences of the same length
    index = torch.tensor([experts for experts, _ in chosen], dtype=torch.int64)
    skipped = torch.tensor([not flag for _, flag in chosen])
    expected = [
        [sum(expert in experts for experts, flag in half if flag) for expert in range(EXPERTS)]
        for half in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :])
    ]
    assignments, counts = sort_on_host(index, skipped, EXPERTS)
    on_device, ends, _ = sort_on_device(index, skipped, torch.arange(EXPERTS))
    for sorted_A, ends_E in ((assignments, counts[0].cumsum(0)), (on_device, ends)):
        assert loads_by_sequence(sorted_A, ends_E, index.numel() // 2, 2).tolist() == expected
