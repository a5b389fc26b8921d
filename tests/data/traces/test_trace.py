"""Loads derived from a trace are the model's own: checked against what its routers let through."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.traces.router_tap import RouterTap
from data.traces.trace import PADDING, dispatched_mask, pad_tokens
from tests.conftest import small_switch


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.integers(1, 12))
def test_dispatched_is_the_first_capacity_tokens_of_each_expert_in_a_sequence(seed, sequences, length, capacity):
    experts = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (sequences, length)))
    kept = dispatched_mask(experts, 4, capacity)
    for row, mask in zip(experts.tolist(), kept.tolist(), strict=True):
        seen = dict.fromkeys(range(4), 0)
        for expert, got in zip(row, mask, strict=True):
            seen[expert] += 1
            assert got == (seen[expert] <= capacity)


def test_agrees_with_the_models_masks_where_tokens_drop_and_rows_are_padded(switch):
    model, layout = switch.model, switch.layout
    tokens = pad_tokens([np.arange(3, 3 + size) for size in (40, 25, 7)], pad=0)
    with RouterTap(model, layout) as tap, torch.inference_mode():
        model.encoder(input_ids=tokens.input_ids, attention_mask=tokens.mask.long())
    (call,) = tap.take()[0]
    real = call.experts.masked_fill(~tokens.mask, PADDING)
    derived = dispatched_mask(real, layout.num_experts, layout.expert_capacity)
    assert (derived == (call.kept & tokens.mask)).all()
    assert 0 < int(derived.sum()) < tokens.num_tokens, "the case must drop some tokens"


def test_the_tap_keeps_the_likeliest_experts(switch):
    model, layout = switch.model, switch.layout
    with RouterTap(model, layout, top=3) as tap, torch.inference_mode():
        model.encoder(input_ids=torch.arange(3, 33)[None])
    (call,) = tap.take()[0]
    assert torch.equal(call.top_experts[..., 0], call.experts)
    assert torch.equal(call.top_probability[..., 0], call.probability)
    assert (call.top_probability.diff(dim=-1) <= 0).all()
    with pytest.raises(ValueError, match=f"top is 9, expected 0 to {layout.num_experts}"):
        RouterTap(model, layout, top=9)


def test_the_tap_changes_nothing_and_leaves_nothing_behind():
    model = small_switch()
    layout_ids = torch.arange(3, 33)[None]
    before = model.encoder(input_ids=layout_ids)[0]
    from data.models.layout import MoELayout

    with RouterTap(model, MoELayout.from_model(model, "m")) as tap:
        assert torch.equal(model.encoder(input_ids=layout_ids)[0], before)
        assert len(tap.take()[0]) == 1
    model.encoder(input_ids=layout_ids)
    assert tap.take() == [[], []]
