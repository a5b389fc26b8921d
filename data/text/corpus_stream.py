"""The default traffic: the offline corpus in phases that differ in how the topics change, then segments kept unseen."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.arrays import FloatArray
from data.text.batching import Batcher, BatchingConfig, Decode, Row, TextBatch, sequences, text_stream, time_splits
from data.text.corpus import Document, offline_corpus, read_text

PHASES = ("steady", "drift", "every_10", "every_1")
TRAINED_MIX = {"news": 0.35, "tweets": 0.2, "speech-de": 0.15, "speech-es": 0.1, "code": 0.2}
UNSEEN, UNSEEN_PATTERN = "unseen", "every_5"
UNSEEN_MIX = {"speech-nl": 0.5, "speech-en": 0.5}
MAIN_SHARE = 0.9  # of a batch that has one main topic


def phase_sizes(traffic: BatchingConfig) -> dict[str, int]:
    """Batches in each phase, in order."""
    return dict.fromkeys(PHASES, traffic.batches) | {UNSEEN: max(traffic.batches // 3, 1)}


def corpus_splits(traffic: BatchingConfig) -> list[str]:
    """Split of every batch: each phase is split in time, unseen segments are for testing alone."""
    sizes = phase_sizes(traffic)
    unseen = sizes.pop(UNSEEN)
    return [split for size in sizes.values() for split in time_splits(size)] + ["test"] * unseen


def topic_mixes(pattern: str, base: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Share of each segment in each batch of a phase, `[count, S]`."""
    topics = np.eye(len(base)) * MAIN_SHARE + (1 - MAIN_SHARE) * base
    if pattern == "steady":
        return np.tile(base, (count, 1))
    if pattern == "drift":  # slides from one topic to the next, twice around in a phase
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
    documents: Iterable[Document], tokenizer: Any, decode: Decode, traffic: BatchingConfig
) -> Iterator[TextBatch]:
    """The default stream; no sequence is used twice.

    Raises:
        ValueError: If a segment has no text left.
    """
    by_segment: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_segment[document.segment].append(document)
    pools = {name: sequences(texts, tokenizer, traffic.length) for name, texts in by_segment.items()}
    former, rng, number = Batcher(tokenizer, decode, traffic), np.random.default_rng(traffic.seed), 0
    for phase, count in phase_sizes(traffic).items():
        mix, pattern = (UNSEEN_MIX, UNSEEN_PATTERN) if phase == UNSEEN else (TRAINED_MIX, phase)
        for shares in topic_mixes(pattern, np.array(list(mix.values())), count, rng):
            of_batch = former.rng(number)
            batch = former.form(number, phase, _draw(pools, list(mix), shares, of_batch, number), of_batch)
            assert batch is not None, "the draw never ends"
            yield batch
            number += 1


def _draw(
    pools: dict[str, Iterator[Row]], names: list[str], shares: FloatArray, rng: np.random.Generator, number: int
) -> Iterator[Row]:
    """Endless sequences, each of a segment drawn by its share and the next one of that segment."""
    while True:
        segment = str(rng.choice(names, p=shares))
        row = next(pools[segment], None)
        if row is None:
            raise ValueError(
                f"segment '{segment}' has no text left at batch {number}; lower --traffic.batches or --traffic.largest"
            )
        yield row


def open_stream(text: str | None, tokenizer: Any, decode: Decode, traffic: BatchingConfig) -> Iterator[TextBatch]:
    """The stream of batches: the user's text, or the offline corpus where there is none."""
    if text is None:
        return corpus_stream(offline_corpus("traffic"), tokenizer, decode, traffic)
    return text_stream(read_text(text), tokenizer, decode, traffic)
