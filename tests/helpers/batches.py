"""Random batches of every awkward kind, and how far an engine is from the plain model on them."""

import numpy as np
import torch

from data.traces.trace import TokenBatch, pad_tokens
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine


def batches(count: int = 6) -> list[ModelBatch]:
    """Ragged batches, long enough for tokens to drop (capacity 6 a sequence)."""
    rng = np.random.default_rng(0)

    def rows(size: int, longest: int):
        return pad_tokens([rng.integers(3, 400, rng.integers(1, longest)) for _ in range(size)], pad=0)

    return [ModelBatch(rows(size, 60), rows(size, 20)) for size in rng.integers(1, 6, count)]


def blank_rows() -> ModelBatch:
    """Sequences of which one has an encoder part that is nothing but padding, and a decoder part that reads it."""
    batch = next(batch for batch in batches() if len(batch.tokens.mask) > 1)
    batch.tokens.mask[0] = False
    return batch


def left_padded(batch: ModelBatch) -> ModelBatch:
    """The same rows with their padding in front, where it takes up capacity."""
    flip = torch.arange(batch.tokens.mask.shape[1] - 1, -1, -1)
    return ModelBatch(TokenBatch(batch.tokens.input_ids[:, flip], batch.tokens.mask[:, flip]), batch.decoder)


def unusual() -> list[ModelBatch]:
    """Padding left and right, fewer sequences than ranks, one token in all."""
    one = pad_tokens([np.array([7])], pad=0)
    usual = batches(6)
    return [*usual, *map(left_padded, usual), ModelBatch(one, one), usual[0]]


def largest_difference(engine: Engine, plain, stream: list[ModelBatch]) -> float:
    """Between this rank's answers and the plain model's to the whole batch, on real tokens."""
    worst = 0.0
    for batch, output in zip(stream, engine.run(iter(stream)), strict=True):
        real = batch.decoder.mask[output.rows]
        theirs = forward(plain, batch)[output.rows]
        assert output.logits.shape == theirs.shape
        assert output.stats.device_load.sum() == output.stats.load.sum()
        if real.any():
            worst = max(worst, float((output.logits[real] - theirs[real]).abs().max()))
    return worst
