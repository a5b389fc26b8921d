"""Writes a Switch model of any size with random weights.

    python -m benchmarks.support.make_switch --out outputs/switch-base-128 --experts 128

The default sizes are switch-base's. With 128 experts the model takes 29 GB on disk in float32, and one shard at a time
in memory. The tokenizer is the bundled model's.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from benchmarks.support.random_model import write_random
from data.cli import from_command_line, user_errors
from data.models.weights import BUNDLED


def make_switch(
    out: Path = Path("outputs/switch-random"),
    experts: int = 128,
    blocks: int = 12,
    d_model: int = 768,
    d_ff: int = 3072,
    heads: int = 12,
    capacity: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> None:
    """Writes the model folder; does nothing if a complete model is there already.

    Args:
        out: The folder.
        experts: Experts of each MoE layer.
        blocks: Blocks of each stack; every other one has an MoE layer.
        d_model: Size of the hidden states.
        d_ff: Inner size of an expert.
        heads: Attention heads.
        capacity: Expert capacity: tokens of one sequence that an expert accepts.
        dtype: Dtype of the stored weights.
        seed: Seed of the weights.
    """
    config = SwitchTransformersConfig(
        vocab_size=32128, d_model=d_model, d_kv=d_model // heads, d_ff=d_ff, num_heads=heads, num_experts=experts,
        expert_capacity=capacity, num_layers=blocks, num_sparse_encoder_layers=blocks // 2,
        num_decoder_layers=blocks, num_sparse_decoder_layers=blocks // 2, decoder_start_token_id=0,
    )  # fmt: skip
    write_random(SwitchTransformersForConditionalGeneration, config, out, BUNDLED, getattr(torch, dtype), seed)


if __name__ == "__main__":
    with user_errors():
        from_command_line(make_switch)
