"""The training loop of a pretraining run, and the losses that it is judged by."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from data.pretrain.recipe import Recipe, learning_rate
from data.progress import progress


def on_device(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}


def fit(model: Any, family: ModuleType, batches: Iterator[dict[str, Tensor]], recipe: Recipe) -> list[float]:
    """Trains the model in place; returns each step's cross-entropy in nats, without the router losses.

    Args:
        model: The model.
        family: Its module in this package.
        batches: What the model is called with, batch after batch.
        recipe: Training settings.
    """
    losses = []
    model.train()
    with family.fast_experts(model), progress(Console(stderr=True)) as bars:
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        task = bars.add_task("pretraining", total=recipe.steps)
        for step, batch in zip(range(recipe.steps), batches, strict=False):
            output = model(**on_device(batch, model), output_router_logits=True)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.step()
            losses.append(float(family.cross_entropy(output)))
            bars.update(task, advance=1, description=f"pretraining, loss {np.mean(losses[-50:]):.3f}")
    return losses


@torch.no_grad()
def held_out_loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean cross-entropy in nats per target token."""
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
