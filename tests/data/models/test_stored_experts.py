"""Experts read one by one from a folder are those that transformers loads, in every family's way of storing them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.models.expert import ExpertFormat
from data.models.model import LoadedModel
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights
from tests.conftest import small_switch
from tests.helpers.families import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_a_row_of_the_loaded_parameters(family, tmp_path):
    model = tiny(family)
    layout = LoadedModel.of(model).layout
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        outline = type(model)(model.config)
    form, stored = ExpertFormat.of(outline, layout), stored_experts(ModelWeights(str(tmp_path)), outline, layout)
    for layer, expert in ((0, 0), (0, 5), (layout.num_layers - 1, 7)):
        for name, tensor in zip(form.names, stored.read(layer, expert), strict=True):
            whole = model.get_submodule(layout.modules[layer]).get_parameter(name)
            assert torch.equal(tensor, whole[expert]), (name, layer, expert)


def test_experts_of_a_switch_model(tmp_path):
    model = small_switch()
    model.save_pretrained(tmp_path)
    layout = LoadedModel.of(model).layout
    wi, wo = stored_experts(ModelWeights(str(tmp_path)), model, layout).read(1, 3)
    own = model.get_submodule(layout.modules[1])["expert_3"]
    assert torch.equal(wi, own.wi.weight)
    assert torch.equal(wo, own.wo.weight)


@pytest.mark.parametrize(("drop", "expected"), [
    ("experts.7.down_proj", r"stores 7 experts of model.layers.1.mlp.experts.down_proj, not expert 7"),
    ("down_proj", r"lacks 3 tensors of experts, first model.layers.0.mlp.experts.down_proj"),
])  # fmt: skip
def test_experts_that_are_missing_are_named(drop, expected, tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if drop not in name}, path)
    with pytest.raises(ValueError, match=expected):
        stored_experts(ModelWeights(str(tmp_path)), model, LoadedModel.of(model).layout).read(1, 7)


def test_an_expert_of_another_shape(tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    other = tiny("qwen3_moe", moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"expert 0 of .*gate_up_proj is \(48, 32\), expected \(32, 32\)"):
        stored_experts(ModelWeights(str(tmp_path)), other, LoadedModel.of(other).layout).read(0, 0)
