"""Layouts of decoder-only models are read off their experts modules, and tell models with other routes apart."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NllbMoeConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from data.models.family import check_family
from data.models.layout import MoELayout
from data.models.registered import registered_layout


def small_qwen3(**changes):
    """Four layers, the first and third of them dense, with 8 experts of which a token takes 3."""
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 12, "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | changes)).eval()


def test_dense_layers_count_and_experts_are_read_off_the_model():
    layout = registered_layout(small_qwen3(), "m")
    assert layout.layers == (("decoder", 1), ("decoder", 3))
    assert layout.modules == ("model.layers.1.mlp.experts", "model.layers.3.mlp.experts")
    assert (layout.num_experts, layout.experts_per_token, layout.d_ff, layout.d_model) == (8, 3, 12, 16)
    assert (layout.causal, layout.expert_capacity, layout.family) == (True, None, "qwen3_moe")
    assert layout.num_input_layers == layout.num_layers == 2, "a decoder-only model routes the prompt in every layer"
    assert MoELayout.from_json(layout.to_json()) == layout


def test_another_router_or_top_k_is_another_model():
    model = small_qwen3()
    layout = registered_layout(model, "m")
    assert registered_layout(small_qwen3(num_experts_per_tok=2), "m").fingerprint() != layout.fingerprint()
    with torch.no_grad():
        model.model.layers[3].mlp.gate.weight[0, 0] += 1
    assert registered_layout(model, "m").fingerprint() != layout.fingerprint()


def test_a_model_without_experts_is_refused():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(ValueError, match="tiny is a llama model without experts"):
        registered_layout(LlamaForCausalLM(LlamaConfig(**sizes)), "tiny")


def test_a_router_that_does_not_tell_its_top_k_is_refused(monkeypatch):
    model = small_qwen3()
    monkeypatch.setattr("data.models.registered.TOP_K_NAMES", ("number of experts",))
    with pytest.raises(ValueError, match=r"mlp.experts: neither its router nor the configuration tells the experts of"):
        registered_layout(model, "m")


def test_nllb_is_refused_because_transformers_takes_its_router_mask_for_numbers_of_experts():
    """Once this fails, transformers has mended its experts, and they can be supported."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_experts": 8, "encoder_ffn_dim": 8, "expert_capacity": 64}
    block = NllbMoeSparseMLP(NllbMoeConfig(**sizes), ffn_dim=8).eval()
    hidden = torch.randn(1, 40, 16)
    chosen = block.router(hidden[0])[0].sum(0)
    block(hidden).sum().backward()
    computed = [block.experts[f"expert_{expert}"].fc1.weight.grad is not None for expert in range(8)]
    assert (chosen > 0).all()
    assert computed == [True, True] + [False] * 6
    with pytest.raises(ValueError, match=r"is a nllb-moe model, .*: transformers itself computes it wrongly"):
        check_family("facebook/nllb-moe-54b", NllbMoeConfig().to_dict())
