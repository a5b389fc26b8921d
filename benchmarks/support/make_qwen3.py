"""Writes a Qwen3-MoE model of any size with random weights.

    python -m benchmarks.support.make_qwen3 --out outputs/qwen3-wide-64

By default it has the MoE layers of qwen3-mini-64 (four, of 64 experts, of which a token takes four) with experts of
Qwen3-30B-A3B's size, 2,048 x 768: 4.8 GB of them in float32. The tokenizer is the bundled model's.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.support.random_model import write_random
from data.cli import from_command_line, user_errors


def make_qwen3(
    out: Path = Path("outputs/qwen3-random"),
    experts: int = 64,
    top_k: int = 4,
    layers: int = 4,
    d_model: int = 2048,
    d_ff: int = 768,
    heads: int = 16,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> None:
    """Writes the model folder; does nothing if a complete model is there already.

    Args:
        out: The folder.
        experts: Experts of each layer.
        top_k: Experts that a token takes.
        layers: Layers, each with an MoE block.
        d_model: Size of the hidden states.
        d_ff: Inner size of an expert.
        heads: Attention heads; a quarter as many for keys and values.
        dtype: Dtype of the stored weights.
        seed: Seed of the weights.
    """
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=d_model, moe_intermediate_size=d_ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, num_experts=experts, num_experts_per_tok=top_k,
        norm_topk_prob=True, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    write_random(Qwen3MoeForCausalLM, config, out, "qwen3-mini-64", getattr(torch, dtype), seed)


if __name__ == "__main__":
    with user_errors():
        from_command_line(make_qwen3)
