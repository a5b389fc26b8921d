import json

import numpy as np
import pytest

from runtime.balancing.few_moves import rebalance
from runtime.balancing.plan import ReplicationPlan
from runtime.balancing.plan_file import PlannedLayers, SavedPlan


@pytest.fixture
def saved() -> SavedPlan:
    """Four devices, eight experts, four redundant: MoE layers 1, 2 and 4 of a model of six layers."""
    weight = np.random.default_rng(0).zipf(1.5, (3, 8)).clip(max=99).astype(float)
    plan = ReplicationPlan(rebalance(weight, 12, 4), 4)
    return SavedPlan(plan, PlannedLayers([1, 2, 4], 6, "owner/model", "0123456789abcdef"))


@pytest.fixture
def qwen_config(tmp_path):
    """A folder with the config.json of a Qwen3-MoE with six layers, of which 1, 2 and 4 are MoE layers."""
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "intermediate_size": 16,
        "moe_intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 3, 5], "vocab_size": 40, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
