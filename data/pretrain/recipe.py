"""Recipe: the settings of a pretraining run, and its learning rate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Training settings.

    Attributes:
        steps: Number of optimiser steps; 0 takes the family's.
        sequences: Sequences in a batch.
        length: Tokens of a sequence; of a Switch model's, before spans are masked.
        vocabulary: Number of tokens of the tokenizer; 0 takes the family's.
        peak_lr: Highest learning rate of AdamW: linear warm-up over 5 % of the steps, then cosine.
        seed: Seed of weights and batches.
    """

    steps: int = 0
    sequences: int = 32
    length: int = 120
    vocabulary: int = 0
    peak_lr: float = 3e-3
    seed: int = 0


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine to zero."""
    warm_up = max(recipe.steps // 20, 1)
    if step < warm_up:
        return recipe.peak_lr * (step + 1) / warm_up
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))
