"""Traffic: batches of token ids in the order a server gets them, in phases that differ in how the topics change."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.corruption import Ids, corrupt
from data.text import Document

PHASES = ("steady", "drift", "every_10", "every_1")
TRAINED_MIX = {"news": 0.35, "tweets": 0.2, "speech-de": 0.15, "speech-es": 0.1, "code": 0.2}
UNSEEN_MIX = {"speech-nl": 0.5, "speech-en": 0.5}
SHORTEST = 8  # tokens; what is left of a document after cutting is not worth a sequence below that
MAIN_SHARE = 0.9  # of a batch that has one main topic
TOKENIZED_AT_ONCE = 64  # documents


@dataclass(frozen=True)
class Traffic:
    """What the stream of batches looks like.

    Attributes:
        batches: Batches in each phase; a third as many of unseen text.
        smallest: Fewest sequences in a batch.
        largest: Most sequences in a batch.
        length: Most tokens of a sequence.
        seed: Seeds batch sizes, topics and masked spans.
    """

    batches: int = 80
    smallest: int = 16
    largest: int = 64
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}; at least 1 is needed")
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"batch sizes {self.smallest} to {self.largest} are no range; expected 1 <= smallest <= largest"
            )
        if self.length < SHORTEST:
            raise ValueError(f"length is {self.length} tokens; at least {SHORTEST} are needed")


@dataclass(frozen=True)
class TrafficBatch:
    """One batch before the model has seen it.

    Attributes:
        number: Its place in the stream.
        phase: Which kind of traffic.
        split: "train", "gap", "val" or "test".
        segments: Segment of each sequence, `[B]`.
        sources: Encoder token ids of each sequence.
        targets: Decoder target ids of each sequence; empty where the decoder does not run.
    """

    number: int
    phase: str
    split: str
    segments: tuple[str, ...]
    sources: list[Ids]
    targets: list[Ids]


def time_splits(count: int) -> list[str]:
    """Splits a stream in time: 62 % train, a gap, 13 % validation, a gap, the rest test."""
    gap = max(count // 40, 1) if count >= 8 else 0
    train, val = round(count * 0.62), round(count * 0.13)
    parts = ["train"] * train + ["gap"] * gap + ["val"] * val + ["gap"] * gap
    return (parts + ["test"] * count)[:count]


def topic_mixes(phase: str, base: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> Any:
    """Share of each segment in each batch of a phase, `[count, S]`."""
    topics = np.eye(len(base)) * MAIN_SHARE + (1 - MAIN_SHARE) * base
    if phase == "steady":
        return np.tile(base, (count, 1))
    if phase == "drift":  # slides from one topic to the next, twice around in a phase
        place = np.arange(count) / count * 2 * len(base)
        left, part = place.astype(int) % len(base), place % 1
        order = rng.permutation(len(base))
        return topics[order[left]] * (1 - part)[:, None] + topics[order[(left + 1) % len(base)]] * part[:, None]
    period = int(phase.removeprefix("every_"))
    chosen = [int(rng.choice(len(base), p=base))]
    while len(chosen) * period < count:
        others = np.where(np.arange(len(base)) == chosen[-1], 0, base)
        chosen.append(int(rng.choice(len(base), p=others / others.sum())))
    return topics[np.repeat(chosen, period)[:count]]


def _sequences(documents: list[Document], tokenizer: Any, length: int) -> Iterator[Ids]:
    """Cuts documents, in their order, into sequences of at most `length` tokens."""
    for start in range(0, len(documents), TOKENIZED_AT_ONCE):
        texts = [document.text for document in documents[start : start + TOKENIZED_AT_ONCE]]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            for cut in range(0, len(ids), length):
                if len(ids) - cut >= SHORTEST:
                    yield np.asarray(ids[cut : cut + length], dtype=np.int64)


class Shaper:
    """Gives sequences their final form: masked spans and decoder targets, or plain text for the encoder alone."""

    def __init__(self, tokenizer: Any, decode: bool) -> None:
        self.eos = tokenizer.eos_token_id
        self.decode = decode
        names = [f"<extra_id_{index}>" for index in range(100)]
        known = [tokenizer.convert_tokens_to_ids(name) for name in names]
        self.sentinels = np.array([idx for idx in known if idx is not None and idx != tokenizer.unk_token_id])
        if decode and not len(self.sentinels):
            raise ValueError("the tokenizer has no <extra_id_0> to mask spans with; use --decode none")

    def __call__(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Encoder input and decoder target of one sequence."""
        if self.decode:
            return corrupt(ids, self.sentinels, self.eos, rng)
        return np.append(ids[:-1], self.eos), np.array([], dtype=np.int64)


def _batches(
    first: int,
    phase: str,
    splits: list[str],
    mixes: Any,
    pools: dict[str, Iterator[Ids]],
    shaper: Shaper,
    traffic: Traffic,
) -> Iterator[TrafficBatch]:
    for number, (split, mix) in enumerate(zip(splits, mixes, strict=True), start=first):
        rng = np.random.default_rng((traffic.seed, number))
        size = int(rng.integers(traffic.smallest, traffic.largest + 1))
        segments = tuple(str(name) for name in rng.choice(list(pools), size, p=mix))
        shaped = [shaper(_next(pools, segment, number), rng) for segment in segments]
        sources, targets = zip(*shaped, strict=True)
        yield TrafficBatch(number, phase, split, segments, list(sources), list(targets))


def _next(pools: dict[str, Iterator[Ids]], segment: str, number: int) -> Ids:
    ids = next(pools[segment], None)
    if ids is None:
        raise ValueError(
            f"segment '{segment}' has no text left at batch {number}; lower --traffic.batches or batch sizes"
        )
    return ids


def corpus_traffic(
    documents: Iterator[Document], tokenizer: Any, decode: bool, traffic: Traffic
) -> Iterator[TrafficBatch]:
    """The default stream over the offline corpus: four phases of trained segments, then one of unseen ones."""
    by_segment: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_segment[document.segment].append(document)
    pools = {name: _sequences(texts, tokenizer, traffic.length) for name, texts in by_segment.items()}
    shaper, rng, first = Shaper(tokenizer, decode), np.random.default_rng(traffic.seed), 0
    unseen = max(traffic.batches // 3, 1)
    plan = [(phase, phase, TRAINED_MIX, time_splits(traffic.batches)) for phase in PHASES]
    plan.append(("unseen", "every_5", UNSEEN_MIX, ["test"] * unseen))
    for phase, pattern, mix, splits in plan:
        base = np.array(list(mix.values()))
        mixes = topic_mixes(pattern, base, len(splits), rng)
        chosen = {name: pools[name] for name in mix}
        yield from _batches(first, phase, splits, mixes, chosen, shaper, traffic)
        first += len(splits)


def text_traffic(
    documents: Iterator[Document], tokenizer: Any, decode: bool, traffic: Traffic
) -> Iterator[TrafficBatch]:
    """A stream over the user's own text in its own order, at most `traffic.batches` batches.

    Raises:
        ValueError: If there is not one usable line of text.
    """
    shaper, numbers = Shaper(tokenizer, decode), itertools.count()
    rows: list[tuple[str, Ids]] = []
    ready: list[list[tuple[str, Ids]]] = []
    size = 0
    for document in documents:
        for ids in _sequences([document], tokenizer, traffic.length):
            if not size:
                size = int(
                    np.random.default_rng((traffic.seed, len(ready))).integers(traffic.smallest, traffic.largest + 1)
                )
            rows.append((document.segment, ids))
            if len(rows) == size:
                ready.append(rows)
                rows, size = [], 0
        if len(ready) >= traffic.batches:
            break
    if rows and len(ready) < traffic.batches:
        ready.append(rows)
    if not ready:
        raise ValueError(f"the text has no usable line; expected at least one of {SHORTEST} tokens")
    for number, split, batch in zip(numbers, time_splits(len(ready)), ready, strict=False):
        rng = np.random.default_rng((traffic.seed, number, 1))
        shaped = [shaper(ids, rng) for _, ids in batch]
        yield TrafficBatch(
            number,
            "text",
            split,
            tuple(segment for segment, _ in batch),
            [s for s, _ in shaped],
            [t for _, t in shaped],
        )
