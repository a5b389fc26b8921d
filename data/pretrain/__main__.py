"""Trains a small MoE model and its tokenizer on the offline corpus.

Run it with `python -m data.pretrain` for the bundled Switch Transformer (about 20 minutes on one core), or with
`python -m data.pretrain --family qwen3_moe` for a decoder-only model with top-4 routing (at most 15 minutes on two).
"""

import itertools
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.cli import from_command_line, print_json, user_errors
from data.files import check_new, whole_folder, write_json
from data.models.device import Device, pick_device
from data.pretrain import qwen3_moe, switch
from data.pretrain.card import write_card
from data.pretrain.recipe import Recipe
from data.pretrain.tokenizer import token_streams, train_tokenizer
from data.pretrain.training import fit, held_out_loss, unigram_loss
from data.text.corpus import offline_corpus

FAMILIES = {"switch": switch, "qwen3_moe": qwen3_moe}


def pretrain(
    family: Literal["switch", "qwen3_moe"] = "switch",
    out: Path | None = None,
    recipe: Recipe = Recipe(),
    device: Device | None = None,
) -> None:
    """Trains a model and writes bf16 safetensors, tokenizer, model card and loss curve to a folder.

    Args:
        family: "switch" is the bundled Switch Transformer, "qwen3_moe" a decoder-only model with top-4 routing.
        out: Folder to write; it appears complete or not at all. By default outputs/ and the model's name.
        recipe: Training settings.
        device: Where the model is trained: CUDA where there is a device, else the CPU.
    """
    kind = FAMILIES[family]
    out = out or Path("outputs") / kind.NAME
    recipe = replace(recipe, steps=recipe.steps or kind.STEPS, vocabulary=recipe.vocabulary or kind.VOCABULARY)
    check_new(out)
    place = pick_device(device)
    torch.manual_seed(recipe.seed)
    documents = list(offline_corpus("pretrain"))
    tokenizer = train_tokenizer(documents, recipe.vocabulary, kind.SENTINELS)
    streams = token_streams(documents, tokenizer)
    held_out = token_streams(list(offline_corpus("traffic")), tokenizer)
    model: Any = kind.build(recipe).to(place)
    losses = fit(model, kind, kind.batches(streams, tokenizer, recipe, recipe.seed), recipe)
    model = model.bfloat16()  # the losses are measured with the weights as saved
    marks = [*range(100, len(losses), 100), len(losses)]
    test = list(itertools.islice(kind.batches(held_out, tokenizer, recipe, recipe.seed + 1), 40))
    seen = list(itertools.islice(kind.batches(streams, tokenizer, recipe, recipe.seed + 2), 400))
    facts: dict[str, Any] = {
        "family": family,
        "recipe": asdict(recipe),
        "tokens": {segment: len(stream) for segment, stream in streams.items()},
        "held_out_loss": held_out_loss(model.float(), test),
        "unigram_loss": unigram_loss(seen, test, recipe.vocabulary),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "loss_curve": [[step, float(np.mean(losses[max(step - 100, 0) : step]))] for step in marks],
    }
    with whole_folder(out) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", facts)
        write_card(folder, kind, model.config, facts)
    loss, unigram = facts["held_out_loss"], facts["unigram_loss"]
    print(f"Wrote {out}: {loss:.3f} nats on held-out text, a unigram model {unigram:.3f}", file=sys.stderr)
    print_json({"model": str(out), "held_out_loss": loss, "unigram_loss": unigram})


def main() -> None:
    """Command line of `pretrain`; in a pipe, the last line of stdout is JSON."""
    with user_errors():
        from_command_line(pretrain)


if __name__ == "__main__":
    main()
