"""Tiny random models of decoder-only families, and the table of them in docs/models.md.

    python -m tests.helpers.families            # writes the table
    python -m tests.helpers.families --check    # exit code 1 if it is out of date

Weights are random; a model has 2 or 3 MoE layers, 8 experts and 40,000 to 400,000 parameters.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from data.models.expert import ExpertFormat
from data.models.model import LoadedModel
from data.models.registered import attends_only, moe_modules

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "shared_expert_intermediate_size": 24,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Settings of every family that has them."""
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many key heads as heads
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT,
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "shared_intermediate_size": 32,
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": HYBRID,
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "n_group": 1, "moe_shared_expert_intermediate_size": 24,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "solar_open": {},
}  # fmt: skip
"""Families that are tested, with the settings that their configurations need besides."""


@dataclass(frozen=True)
class Row:
    """What the table tells about a family."""

    family: str
    experts: str
    shared: bool
    skips_padding: bool

    def __str__(self) -> str:
        shared, padding = "yes" if self.shared else "-", "skipped" if self.skips_padding else "computed"
        return f"| {self.family} | {self.experts} | {shared} | {padding} |"


def tiny(family: str, **changes: Any) -> Any:
    """A tiny random model of a family, the same one in every call, its experts' implementation "eager"."""
    kind = CONFIG_MAPPING[family]
    known = set(getattr(kind, "__dataclass_fields__", {})) | set(kind.attribute_map)
    settings = {name: value for name, value in COMMON.items() if name in known}
    config = kind(**settings | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():  # biases are made with zeros, and two equal routers would route alike
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def row(family: str) -> Row:
    """The table's row, read off a tiny model."""
    model = tiny(family)
    form = ExpertFormat.of(model, LoadedModel.of(model).layout)
    marks = ["gated" if form.gated else "no gate"]
    marks += [mark for mark in ("interleaved", "transposed", "biased") if getattr(form, mark)]
    shared = any(layer.shared_parameters for layer in moe_modules(model))
    return Row(family, ", ".join(marks), shared, attends_only(model))


def page() -> str:
    """docs/models.md with its table as it should be."""
    head, _, rest = PAGE.read_text().partition("| family | experts |")
    after = rest.partition("\n\n")[2]
    table = ["| family | experts | shared experts | padding |", "|---|---|---|---|", *map(str, map(row, FAMILIES))]
    return head + "\n".join(table) + "\n\n" + after


def main() -> None:
    """Writes the table, or checks it."""
    if "--check" in sys.argv:
        sys.exit(page() != PAGE.read_text())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
