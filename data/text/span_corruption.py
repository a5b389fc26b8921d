"""Span corruption, the training task of Switch Transformers: the decoder fills in masked spans of the encoder's input.

Method: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", section 3.1.4 (15 % of the tokens, mean span of three).
"""

import numpy as np

from data.arrays import IntArray

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


def _partition(total: int, parts: int, rng: np.random.Generator) -> IntArray:
    """Cuts `total` into `parts` positive lengths at random, `[parts]`: 7 into 3 may give [2, 4, 1]."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False) + 1)
    return np.diff(np.concatenate(([0], cuts, [total])))


def corrupt(ids: IntArray, sentinels: IntArray, eos: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Masks random spans: returns the encoder input with sentinels and the decoder target with the masked tokens.

    Ids [a, b, c, d, e] with the spans b and d e masked give [a, <0>, c, <1>, eos] and [<0>, b, <1>, d, e, eos].

    Args:
        ids: Token ids of one sequence, `[T]`, without end-of-sequence.
        sentinels: Ids of the sentinel tokens in order of use; their number limits the number of spans.
        eos: Id of the end-of-sequence token, which ends both results.
        rng: Random generator that draws the spans.
    """
    noise = min(max(round(len(ids) * NOISE_DENSITY), 1), len(ids) - 1)
    if noise < 1:  # a single token is not masked
        return np.append(ids, eos), np.array([eos])
    spans = min(max(round(noise / MEAN_SPAN), 1), len(ids) - noise, len(sentinels))
    lengths = np.stack([_partition(len(ids) - noise, spans, rng), _partition(noise, spans, rng)], axis=1)
    pieces = np.split(ids, np.cumsum(lengths.reshape(-1))[:-1])
    source, target = [], []
    for sentinel, kept, masked in zip(sentinels, pieces[::2], pieces[1::2], strict=False):
        source += [kept, [sentinel]]
        target += [[sentinel], masked]
    return np.concatenate([*source, [eos]]).astype(np.int64), np.concatenate([*target, [eos]]).astype(np.int64)
