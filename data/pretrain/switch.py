"""The bundled Switch Transformer: its geometry, and span corruption as its task."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from data.arrays import IntArray
from data.pretrain.grouped_experts import group_experts, ungroup_experts
from data.pretrain.recipe import Recipe
from data.text.span_corruption import corrupt

SENTINELS = tuple(f"<extra_id_{index}>" for index in range(32))
NAME, KIND = "switch-mini-64", "small Switch Transformer"
TASK = "span corruption (15 % of the tokens, mean span 3)"
ROUTING = "top-1 routing, a capacity of 16 tokens a sequence; losses: auxiliary 0.001, z 0.001; jitter 0.01"
STEPS, VOCABULARY = 1600, 8192


def small_config(recipe: Recipe) -> SwitchTransformersConfig:
    """Configuration of 4 + 4 blocks, 2 + 2 of them MoE layers with 64 experts and a capacity of 16 tokens."""
    return SwitchTransformersConfig(
        vocab_size=recipe.vocabulary, d_model=128, d_kv=32, d_ff=80, num_heads=4, num_experts=64, expert_capacity=16,
        num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=4, num_sparse_decoder_layers=2,
        dropout_rate=0.0, router_aux_loss_coef=0.001, router_z_loss_coef=0.001, router_jitter_noise=0.01,
        decoder_start_token_id=0,
    )  # fmt: skip


def build(recipe: Recipe) -> SwitchTransformersForConditionalGeneration:
    """The model before training."""
    return SwitchTransformersForConditionalGeneration(small_config(recipe))


def batches(
    streams: dict[str, IntArray], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yields `{input_ids, attention_mask, labels}` without end; segments are drawn by the square root of their size."""
    rng = np.random.default_rng(seed)
    sentinels = np.array(tokenizer.convert_tokens_to_ids(list(SENTINELS)))
    weights = np.sqrt([len(stream) for stream in streams.values()])
    while True:
        rows = []
        for segment in rng.choice(list(streams), recipe.sequences, p=weights / weights.sum()):
            start = rng.integers(len(streams[segment]) - recipe.length)
            ids = streams[segment][start : start + recipe.length]
            rows.append(corrupt(ids, sentinels, tokenizer.eos_token_id, rng))
        yield collate(rows, pad=tokenizer.pad_token_id)


def collate(rows: list[tuple[IntArray, IntArray]], pad: int) -> dict[str, Tensor]:
    """Pads pairs of encoder input and decoder target to one batch; padded labels are -100."""
    source = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[0]) for row in rows], True, pad)
    labels = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[1]) for row in rows], True, -100)
    return {"input_ids": source, "attention_mask": (source != pad).long(), "labels": labels}


@contextmanager
def fast_experts(model: SwitchTransformersForConditionalGeneration) -> Iterator[None]:
    """A context in which the experts of a layer are computed together."""
    originals = group_experts(model)
    yield
    ungroup_experts(model, originals)


def cross_entropy(output: Any) -> Tensor:
    """The training loss of a forward without the router losses, nats per target token."""
    router = 0.001 * (output.encoder_z_loss + output.decoder_z_loss)
    loss: Tensor = output.loss - router - 0.001 * (output.encoder_aux_loss + output.decoder_aux_loss)
    return loss.detach()
