"""A layout identifies a model: same routing, same fingerprint; anything else differs."""

import dataclasses

import pytest
import torch

from data.models.layout import MoELayout
from tests.conftest import small_switch


def test_reads_moe_layers_off_the_model():
    layout = MoELayout.from_model(small_switch(), "m")
    assert layout.layers == (("encoder", 1), ("decoder", 1))
    assert layout.modules == ("encoder.block.1.layer.1.mlp.experts", "decoder.block.1.layer.2.mlp.experts")
    assert (layout.num_experts, layout.expert_capacity, layout.num_input_layers) == (8, 6, 1)


def test_fingerprint_follows_the_routers_not_the_place_or_dtype():
    model = small_switch()
    layout = MoELayout.from_model(model, "here")
    assert MoELayout.from_model(model.to(torch.bfloat16), "there", "v2").fingerprint() == layout.fingerprint()
    assert MoELayout.from_model(small_switch(seed=1), "here").fingerprint() != layout.fingerprint()
    assert dataclasses.replace(layout, expert_capacity=7).fingerprint() != layout.fingerprint()


def test_json_round_trip_and_edited_document():
    layout = MoELayout.from_model(small_switch(), "m")
    assert MoELayout.from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match=r"fields give .* edited or damaged"):
        MoELayout.from_json(layout.to_json() | {"num_experts": 16})
    with pytest.raises(ValueError, match="not a model layout"):
        MoELayout.from_json({"num_experts": 16})


def test_other_models_are_refused_by_name():
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="tiny-t5 is a t5 model; expected switch_transformers"):
        MoELayout.from_model(t5, "tiny-t5")
