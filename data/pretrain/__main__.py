"""Trains the bundled small Switch Transformer and its tokenizer on the offline corpus.

Run it with `python -m data.pretrain --out outputs/switch-mini-64`; the 1,600 steps take about 20 minutes on one core.
"""

import itertools
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from data.arrays import IntArray
from data.cli import from_command_line, user_errors
from data.files import check_new, whole_file, whole_folder, write_json
from data.models.device import Device, pick_device
from data.pretrain.grouped_experts import group_experts, ungroup_experts
from data.style import GREY, INK, OURS, drawing, end_labels, heading, panels, save
from data.text.corpus import SEGMENTS, Document, offline_corpus
from data.text.span_corruption import corrupt

SENTINELS = [f"<extra_id_{index}>" for index in range(32)]


@dataclass(frozen=True)
class Recipe:
    """Training settings of the bundled model.

    Attributes:
        steps: Number of optimiser steps.
        sequences: Sequences in a batch.
        length: Tokens of a sequence before spans are masked.
        vocabulary: Number of tokens of the tokenizer.
        peak_lr: Highest learning rate of AdamW: linear warm-up over 5 % of the steps, then cosine.
        seed: Seed of weights, batches and spans.
    """

    steps: int = 1600
    sequences: int = 32
    length: int = 120
    vocabulary: int = 8192
    peak_lr: float = 3e-3
    seed: int = 0


def train_tokenizer(documents: list[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: pad is token 0, end 1, unknown 2; the sentinels come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SENTINELS),
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text[:4000] for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SENTINELS,
        model_max_length=512,
    )


def small_config(recipe: Recipe) -> SwitchTransformersConfig:
    """Configuration of 4 + 4 blocks, 2 + 2 of them MoE layers with 64 experts and a capacity of 16 tokens."""
    return SwitchTransformersConfig(
        vocab_size=recipe.vocabulary, d_model=128, d_kv=32, d_ff=80, num_heads=4, num_experts=64, expert_capacity=16,
        num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=4, num_sparse_decoder_layers=2,
        dropout_rate=0.0, router_aux_loss_coef=0.001, router_z_loss_coef=0.001, router_jitter_noise=0.01,
        decoder_start_token_id=0,
    )  # fmt: skip


def token_streams(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> dict[str, IntArray]:
    """Concatenates the token ids of each segment; every document ends with the end-of-sequence token."""
    streams = {}
    for segment in SEGMENTS:
        texts = [document.text for document in documents if document.segment == segment]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[segment] = np.fromiter(
            itertools.chain.from_iterable([*row, tokenizer.eos_token_id] for row in ids), dtype=np.int64
        )
    return streams


def corrupted_batches(
    streams: dict[str, IntArray], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yields `{input_ids, attention_mask, labels}` without end; segments are drawn by the square root of their size."""
    rng = np.random.default_rng(seed)
    sentinels = np.array(tokenizer.convert_tokens_to_ids(SENTINELS))
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


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine to zero."""
    warm_up = max(recipe.steps // 20, 1)
    if step < warm_up:
        return recipe.peak_lr * (step + 1) / warm_up
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def on_device(batch: dict[str, Tensor], model: SwitchTransformersForConditionalGeneration) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}


def fit(
    model: SwitchTransformersForConditionalGeneration, batches: Iterator[dict[str, Tensor]], recipe: Recipe
) -> list[float]:
    """Trains the model in place; returns each step's cross-entropy in nats, without the router losses."""
    originals = group_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    losses = []
    model.train()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("pretraining", total=recipe.steps)
        for step, batch in zip(range(recipe.steps), batches, strict=False):
            output = model(**on_device(batch, model), output_router_logits=True)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.step()
            router = 0.001 * (output.encoder_z_loss + output.decoder_z_loss)
            router = router + 0.001 * (output.encoder_aux_loss + output.decoder_aux_loss)
            losses.append(float((output.loss - router).detach()))
            progress.update(task, advance=1, description=f"pretraining, loss {np.mean(losses[-50:]):.3f}")
    ungroup_experts(model, originals)
    return losses


@torch.no_grad()
def held_out_loss(model: SwitchTransformersForConditionalGeneration, batches: list[dict[str, Tensor]]) -> float:
    """Mean cross-entropy in nats per decoder token."""
    model.eval()
    total = sum(
        float(model(**on_device(batch, model)).loss) * int((batch["labels"] != -100).sum()) for batch in batches
    )
    return total / sum(int((batch["labels"] != -100).sum()) for batch in batches)


def unigram_loss(seen: list[dict[str, Tensor]], batches: list[dict[str, Tensor]], vocabulary: int) -> float:
    """Cross-entropy in nats of the held-out targets under add-one token frequencies of the training targets `seen`."""
    counts = torch.ones(vocabulary)
    for batch in seen:
        counts += torch.bincount(batch["labels"][batch["labels"] != -100], minlength=vocabulary)
    log_p = (counts / counts.sum()).log()
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    return -float(log_p[labels].mean())


def pretrain(
    out: Path = Path("outputs/switch-mini-64"), recipe: Recipe = Recipe(), device: Device | None = None
) -> None:
    """Trains the bundled model and writes bf16 safetensors, tokenizer, model card and loss curve to a folder.

    Args:
        out: Folder to write; it appears complete or not at all.
        recipe: Training settings.
        device: Where the model is trained: CUDA where there is a device, else the CPU.
    """
    check_new(out)
    place = pick_device(device)
    torch.manual_seed(recipe.seed)
    documents = list(offline_corpus("pretrain"))
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    streams = token_streams(documents, tokenizer)
    held_out = token_streams(list(offline_corpus("traffic")), tokenizer)
    model = SwitchTransformersForConditionalGeneration(small_config(recipe)).to(place)
    losses = fit(model, corrupted_batches(streams, tokenizer, recipe, recipe.seed), recipe)
    model = model.bfloat16()  # the losses are measured with the weights as saved
    test = list(itertools.islice(corrupted_batches(held_out, tokenizer, recipe, recipe.seed + 1), 40))
    seen = list(itertools.islice(corrupted_batches(streams, tokenizer, recipe, recipe.seed + 2), 400))
    facts = {
        "recipe": asdict(recipe),
        "tokens": {segment: len(stream) for segment, stream in streams.items()},
        "held_out_loss": held_out_loss(model.float(), test),
        "unigram_loss": unigram_loss(seen, test, recipe.vocabulary),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "loss_curve": [
            [step, float(np.mean(losses[max(step - 100, 0) : step]))] for step in range(100, len(losses) + 1, 100)
        ],
    }
    with whole_folder(out) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", facts)
        write_card(folder, model.config, facts)
    print(
        json.dumps({"model": str(out), "held_out_loss": facts["held_out_loss"], "unigram_loss": facts["unigram_loss"]})
    )


CARD = """---
license: apache-2.0
library_name: transformers
tags: [switch_transformers, mixture-of-experts]
---
# {name}

A small Switch Transformer for developing and demonstrating Switchcast: {experts} experts in each of {layers} MoE
layers, trained from scratch on real text. Its routing is real and skewed; the text it generates is poor.

| | |
|---|---|
| task | span corruption (15 % of the tokens, mean span 3) |
| text | every other document of the offline corpus (`data/text/corpus.py`): {tokens:,} tokens in {segments} |
| training | {steps:,} steps of {sequences} x {length} tokens, AdamW, peak learning rate {peak_lr}, seed {seed} |
| router losses | auxiliary 0.001, z 0.001, jitter 0.01; capacity {capacity} tokens a sequence |
| held-out loss | **{held_out_loss:.3f}** nats per target token, on the corpus' other documents, in bf16 as saved |
| unigram model | {unigram_loss:.3f} nats on the same tokens |
| made with | `python -m data.pretrain`, torch {torch}, Python {python} |

![loss curve](loss.png)

Not for use as a language model: it was trained on six million tokens. Switchcast's traces are made of the offline
corpus' remaining documents, which this model was not trained on.
"""


def write_card(folder: Path, config: Any, facts: dict[str, Any]) -> None:
    """Writes the model card, README.md and loss.png, beside the weights.

    Args:
        folder: The model's folder.
        config: The model's configuration.
        facts: Content of training.json: recipe, tokens of each segment, losses, versions, loss curve.
    """
    card = CARD.format(
        name=folder.name, experts=config.num_experts, capacity=config.expert_capacity,
        layers=config.num_sparse_encoder_layers + config.num_sparse_decoder_layers,
        tokens=sum(facts["tokens"].values()), segments=", ".join(facts["tokens"]),
        held_out_loss=facts["held_out_loss"], unigram_loss=facts["unigram_loss"],
        **facts["recipe"], **facts["versions"],
    )  # fmt: skip
    with whole_file(folder / "README.md") as aside:
        aside.write_text(card)
    _plot(folder / "loss.png", facts)


@drawing()
def _plot(path: Path, facts: dict[str, Any]) -> None:
    figure, axes = panels(6, 3.4)
    axis = axes[0, 0]
    steps, losses = zip(*facts["loss_curve"], strict=True)
    held_out, unigram = facts["held_out_loss"], facts["unigram_loss"]
    axis.plot(steps, losses, color=OURS, linewidth=2.4)
    axis.axhline(held_out, color=INK, linewidth=1)
    axis.axhline(unigram, color=GREY, linewidth=1)
    axis.set(xlabel="step", ylabel="cross-entropy, nats per target token", xlim=(0, steps[-1]))
    ends = [(losses[-1], f"training {losses[-1]:.2f}", OURS), (held_out, f"held out {held_out:.2f}", INK)]
    end_labels(axis, [*ends, (unigram, f"unigram model {unigram:.2f}", GREY)])
    heading(figure, f"Pretraining of {path.parent.name}", "held-out text in bf16 as saved; training: mean of 100 steps")
    save(figure, path)


def main() -> None:
    """Command line of `pretrain`; the last line of stdout is one JSON document."""
    with user_errors():
        from_command_line(pretrain)


if __name__ == "__main__":
    main()
