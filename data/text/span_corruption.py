"""Span corruption, the task Switch Transformers were trained on: the decoder fills in masked spans of the input.

Source of the method: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", section 3.1.4 (15 % of the tokens, mean span of three).
"""

import numpy as np

from data.arrays import IntArray

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


def _partition(total: int, parts: int, rng: np.random.Generator) -> IntArray:
    """Cuts `total` into `parts` positive lengths at random, `[parts]`."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False) + 1)
    return np.diff(np.concatenate(([0], cuts, [total])))


def corrupt(ids: IntArray, sentinels: IntArray, eos: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Splits token ids into a corrupted encoder input and the decoder target.

    Args:
        ids: Token ids of one sequence, `[T]`, without end-of-sequence.
        sentinels: IntArray of the sentinel tokens in order of use; never more spans than there are of them.
        eos: Id that ends both results.
        rng: Source of the spans.

    Returns:
        Encoder input and decoder target; both end with `eos`.
    """
    noise = min(max(round(len(ids) * NOISE_DENSITY), 1), len(ids) - 1)
    if noise < 1:  # one token: nothing to keep beside the span
        return np.append(ids, eos), np.array([eos])
    spans = min(max(round(noise / MEAN_SPAN), 1), len(ids) - noise, len(sentinels))
    lengths = np.stack([_partition(len(ids) - noise, spans, rng), _partition(noise, spans, rng)], axis=1)
    pieces = np.split(ids, np.cumsum(lengths.reshape(-1))[:-1])
    source, target = [], []
    for sentinel, kept, masked in zip(sentinels, pieces[::2], pieces[1::2], strict=False):
        source += [kept, [sentinel]]
        target += [[sentinel], masked]
    return np.concatenate([*source, [eos]]).astype(np.int64), np.concatenate([*target, [eos]]).astype(np.int64)
