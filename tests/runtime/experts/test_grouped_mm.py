"""Rows are multiplied in pieces that fit a CPU's cache, and every way of multiplying gives the same outputs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.models.expert import ExpertFormat
from runtime.experts.grouped_mm import ExpertFunction, GroupedExperts, pieces_of


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 50))
def test_pieces_hold_every_row_once_and_few_rows_each(sizes, most):
    size_N, start = np.array(sizes), 0
    pieces = list(pieces_of(size_N, most))
    for first, part_N in pieces:
        assert first == start
        assert part_N.sum() <= most or np.count_nonzero(part_N) == 1
        assert part_N.sum() > 0
        start += part_N.sum()
    assert np.array_equal(sum((part_N for _, part_N in pieces), np.zeros_like(size_N)), size_N)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 1, 2), (9, 0, 4, 40), (700, 0, 300, 100), (300, 300, 300, 1), (0, 0, 0, 513)])
def test_outputs_are_those_of_each_expert_alone(sizes, biased):
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 12)] + ([(24,), (8,)] if biased else [])
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")[: len(shapes)]
    form = ExpertFormat(names, tuple(shapes), gated=True)
    tensors = [torch.randn(4, *shape) for shape in shapes]
    function = ExpertFunction(form, lambda inner: inner[..., :12].sigmoid() * inner[..., 12:])
    rows = torch.randn(sum(sizes), 8)
    output = GroupedExperts(tensors, function).compute(rows, np.array(sizes), np.array(sizes), None)
    for expert, part in enumerate(rows.split(sizes)):
        inner = part @ tensors[0][expert].T + (tensors[2][expert] if biased else 0)
        expected = function.between(inner) @ tensors[1][expert].T + (tensors[3][expert] if biased else 0)
        torch.testing.assert_close(output.split(sizes)[expert], expected, rtol=0, atol=1e-4)
