"""Circular block bootstrap: resampled batches for confidence intervals of means over a series. Needs numpy alone."""

import numpy as np

from data.arrays import IntArray

RESAMPLES = 1000
BLOCK = 5
"""Consecutive batches drawn together by default, because neighbours are alike."""


def resampled(count: int, block: int = BLOCK) -> IntArray:
    """Rows of a circular block bootstrap over `count` batches, `[RESAMPLES, count]`; the same rows in every call.

    Blocks of consecutive batches are drawn with replacement; a block that begins near the end continues at the start
    (Politis and Romano 1992). With 6 batches and blocks of 2, a row is for example [4, 5, 0, 1, 5, 0].

    Args:
        count: Batches in the series.
        block: Batches drawn together; fewer where the series is shorter than three blocks.
    """
    block = min(block, max(count // 3, 1))
    starts = np.random.default_rng(0).integers(count, size=(RESAMPLES, -(-count // block)))
    rows: IntArray = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :count] % count
    return rows
