"""The default stream of batches: the offline corpus in phases that differ in how fast topics change.

Phases: steady (one mix of topics), drift (topics slide into each other), every_10 and every_1 (a new main topic every
10 batches, every batch), unseen (segments that occur in no other phase, for testing).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.arrays import FloatArray
from data.text.batching import (
    SHORTEST,
    Batcher,
    BatchingConfig,
    Decode,
    Row,
    TextBatch,
    sequences,
    text_stream,
    time_splits,
)
from data.text.corpus import offline_corpus
from data.text.document import Document
from data.text.source import TextSource

PHASES = ("steady", "drift", "every_10", "every_1")
TRAINED_MIX = {"news": 0.35, "tweets": 0.2, "speech-de": 0.15, "speech-es": 0.1, "code": 0.2}
UNSEEN, UNSEEN_PATTERN = "unseen", "every_5"
UNSEEN_MIX = {"speech-nl": 0.5, "speech-en": 0.5}
MAIN_SHARE = 0.9
"""Fraction of a batch that is of its main topic; the rest follows the mix."""


def phase_sizes(batching: BatchingConfig) -> dict[str, int]:
    """Number of batches in each phase, in order."""
    return dict.fromkeys(PHASES, batching.batches) | {UNSEEN: max(batching.batches // 3, 1)}


def corpus_splits(batching: BatchingConfig) -> list[str]:
    """Split of every batch: each phase is split in time; the unseen segments are test batches."""
    sizes = phase_sizes(batching)
    unseen = sizes.pop(UNSEEN)
    return [split for size in sizes.values() for split in time_splits(size)] + ["test"] * unseen


def topic_mixes(pattern: str, base: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Share of each segment in each batch of a phase, `[count, S]`."""
    topics = np.eye(len(base)) * MAIN_SHARE + (1 - MAIN_SHARE) * base
    if pattern == "steady":
        return np.tile(base, (count, 1))
    if pattern == "drift":  # goes through all topics twice in a phase
        place = np.arange(count) / count * 2 * len(base)
        left, part = place.astype(int) % len(base), (place % 1)[:, None]
        order = rng.permutation(len(base))
        return np.asarray(topics[order[left]] * (1 - part) + topics[order[(left + 1) % len(base)]] * part)
    period = int(pattern.removeprefix("every_"))
    chosen = [int(rng.choice(len(base), p=base))]
    while len(chosen) * period < count:
        others = np.where(np.arange(len(base)) == chosen[-1], 0, base)
        chosen.append(int(rng.choice(len(base), p=others / others.sum())))
    return np.asarray(topics[np.repeat(chosen, period)[:count]])


def corpus_stream(
    documents: Iterable[Document], tokenizer: Any, decode: Decode, batching: BatchingConfig, causal: bool = False
) -> Iterator[TextBatch]:
    """Yields the batches of the default stream; no sequence is used twice.

    Raises:
        ValueError: If a segment has no text left.
    """
    by_segment: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_segment[document.segment].append(document)
    pools = {name: sequences(texts, tokenizer, batching.length) for name, texts in by_segment.items()}
    batcher = Batcher(tokenizer, decode, batching, causal)
    rng, number = np.random.default_rng(batching.seed), 0
    for phase, count in phase_sizes(batching).items():
        mix, pattern = (UNSEEN_MIX, UNSEEN_PATTERN) if phase == UNSEEN else (TRAINED_MIX, phase)
        for shares in topic_mixes(pattern, np.array(list(mix.values())), count, rng):
            of_batch = batcher.rng(number)
            batch = batcher.form(number, phase, _draw(pools, list(mix), shares, of_batch, number), of_batch)
            assert batch is not None, "the draw never ends"
            yield batch
            number += 1


def _draw(
    pools: dict[str, Iterator[Row]], names: list[str], shares: FloatArray, rng: np.random.Generator, number: int
) -> Iterator[Row]:
    """Yields sequences without end: draws a segment by its share and takes that segment's next sequence."""
    while True:
        segment = str(rng.choice(names, p=shares))
        row = next(pools[segment], None)
        if row is None:
            raise ValueError(
                f"segment '{segment}' has no text left at batch {number}; "
                "lower --batching.batches or --batching.largest"
            )
        yield row


def open_stream(
    source: TextSource | None,
    tokenizer: Any,
    decode: Decode,
    batching: BatchingConfig,
    causal: bool = False,
    skip: int = 0,
) -> Iterator[TextBatch]:
    """Yields batches of the user's text, or of the offline corpus if `source` is None.

    Args:
        source: The user's text.
        tokenizer: The model's tokenizer.
        decode: As in `Batcher`.
        batching: Sizes, lengths and seed.
        causal: As in `Batcher`.
        skip: Documents of the user's text that are left out at its beginning, as in `TextSource.documents`.

    Raises:
        ValueError: If the text cannot be read, or gives no batch.
    """
    if source is None:
        yield from corpus_stream(offline_corpus("traffic"), tokenizer, decode, batching, causal)
        return
    batch = None
    for batch in text_stream(source.documents(skip), tokenizer, decode, batching, causal):
        yield batch
    if batch is None:
        raise ValueError(
            f"{source.name} gives no batch ({source.counted()}); expected a document of at least {SHORTEST} tokens"
        )
