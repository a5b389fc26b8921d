"""A layout identifies a model: same routing, same fingerprint; anything else differs."""

import dataclasses

import pytest
import torch

from data.models.layout import SAMPLE, MoELayout
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


def change(model, wanted, by=lambda value: value.add_(0.05 * torch.randn_like(value))):
    """Changes the weights whose name is wanted."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if wanted(name):
                by(value)
    return model


def test_a_model_fine_tuned_with_frozen_routers_is_another_one():
    layout = MoELayout.from_model(small_switch(), "m")
    tuned = MoELayout.from_model(change(small_switch(), lambda name: "router" not in name), "m")
    assert tuned.routers == layout.routers
    assert not tuned.is_same(layout)
    assert MoELayout.from_json(tuned.to_json()) == tuned
    for one in ("shared.weight", "encoder.block.0.layer.1.mlp.wi.weight", "decoder.block.1.layer.0.layer_norm.weight"):
        assert not MoELayout.from_model(change(small_switch(), one.__eq__), "m").is_same(layout), one


def test_router_biases_are_part_of_the_routers():
    def biased(by):
        model = small_switch(router_bias=True)
        return MoELayout.from_model(change(model, lambda name: name.endswith("classifier.bias"), by), "m")

    even = biased(torch.Tensor.zero_)
    assert even.is_same(biased(torch.Tensor.zero_))
    assert not even.is_same(biased(lambda bias: bias.copy_(torch.linspace(-5, 5, 8))))


def test_layouts_of_earlier_versions_are_compared_without_the_digest_they_lack():
    layout, other = MoELayout.from_model(small_switch(), "m"), MoELayout.from_model(small_switch(seed=1), "m")
    earlier = dataclasses.replace(layout, dense="")
    assert "dense" not in earlier.to_json()
    assert MoELayout.from_json(earlier.to_json()) == earlier
    assert earlier.is_same(layout)
    assert layout.is_same(earlier)
    assert not earlier.is_same(other)


def test_the_digest_of_a_large_tensor_takes_a_sample_from_its_first_value_to_its_last():
    layout = MoELayout.from_model(small_switch(), "m")
    table = 400 * 32
    assert table > 3 * SAMPLE

    def changed_at(place):
        model = change(small_switch(), "shared.weight".__eq__, lambda table: table.view(-1)[place].add_(9))
        return MoELayout.from_model(model, "m")

    assert not changed_at(0).is_same(layout)
    assert not changed_at(table - 1).is_same(layout)
    assert changed_at(1).is_same(layout), "documented: single values between those of the sample are not seen"
