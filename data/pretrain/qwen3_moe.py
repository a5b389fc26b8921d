"""A small Qwen3-MoE, decoder-only with top-4 routing: its geometry, and next-token prediction as its task."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from data.arrays import IntArray
from data.pretrain.recipe import Recipe

NAME, KIND = "qwen3-mini-64", "small Qwen3-MoE"
TASK, SENTINELS = "next-token prediction", ()
ROUTING = "top-4 routing with normalised weights, no capacity; auxiliary loss 0.001"
STEPS, VOCABULARY = 800, 4096


def small_config(recipe: Recipe) -> Qwen3MoeConfig:
    """Configuration of 4 layers, each with 64 experts of which a token takes 4."""
    return Qwen3MoeConfig(
        vocab_size=recipe.vocabulary, hidden_size=128, intermediate_size=256, moe_intermediate_size=32,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=64,
        num_experts_per_tok=4, norm_topk_prob=True, router_aux_loss_coef=0.001, max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip


def build(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """The model before training."""
    return Qwen3MoeForCausalLM(small_config(recipe))


def batches(
    streams: dict[str, IntArray], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yields `{input_ids, labels}` without end; segments are drawn by the square root of their size."""
    rng = np.random.default_rng(seed)
    weights = np.sqrt([len(stream) for stream in streams.values()])
    while True:
        rows = []
        for segment in rng.choice(list(streams), recipe.sequences, p=weights / weights.sum()):
            start = rng.integers(len(streams[segment]) - recipe.length)
            rows.append(streams[segment][start : start + recipe.length])
        ids = torch.from_numpy(np.stack(rows))
        yield {"input_ids": ids, "labels": ids}


@contextmanager
def fast_experts(model: Qwen3MoeForCausalLM) -> Iterator[None]:
    """A context in which the experts of a layer are computed together."""
    before = model.config._experts_implementation
    model.set_experts_implementation("grouped_mm")
    yield
    model.set_experts_implementation(before)


def cross_entropy(output: Any) -> Tensor:
    """The training loss of a forward without the router loss, nats per target token."""
    loss: Tensor = output.loss - 0.001 * output.aux_loss
    return loss.detach()
