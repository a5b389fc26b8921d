"""BatchingConfig and Batcher: documents are cut into sequences, and sequences form batches in order of arrival."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from data.arrays import IntArray
from data.text.document import Document
from data.text.span_corruption import corrupt

SHORTEST = 8
"""Fewest tokens of a sequence; a shorter rest of a document is dropped."""
TOKENIZED_AT_ONCE = 64
"""Documents in one call of the tokenizer."""
Decode = Literal["teacher", "generate", "none"]


class Row(NamedTuple):
    """One sequence.

    Attributes:
        segment: Its segment.
        ids: Its token ids.
        document: Number of its document in the stream, from 0.
    """

    segment: str
    ids: IntArray
    document: int = 0


@dataclass(frozen=True)
class BatchingConfig:
    """Settings that cut a stream of text into batches.

    Attributes:
        batches: Batches in each phase of the offline corpus (unseen text: a third of that); most batches of other text.
        smallest: Fewest sequences in a batch; sizes are drawn uniformly on a logarithmic scale.
        largest: Most sequences in a batch; equal to smallest for batches of a fixed size.
        length: Most tokens in a sequence.
        token_budget: Most positions in a batch, padding included, like a server's token budget; 0 for no limit.
        seed: Seed of batch sizes, topics and masked spans.
    """

    batches: int = 64
    smallest: int = 16
    largest: int = 64
    length: int = 128
    token_budget: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}; at least 1 is needed")
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"batch sizes {self.smallest} to {self.largest} are not a range; give 1 <= smallest <= largest"
            )
        if self.length < SHORTEST:
            raise ValueError(f"length is {self.length} tokens; at least {SHORTEST} are needed")
        if self.token_budget and self.token_budget <= self.length:
            raise ValueError(f"token_budget {self.token_budget} holds no sequence of {self.length} tokens; give more")


@dataclass(frozen=True)
class TextBatch:
    """Token ids of one batch, not padded yet.

    Attributes:
        number: Number of the batch in the stream, from 0.
        phase: Part of the stream, such as "steady"; "text" for the user's own text.
        segments: Segment of each sequence, `[B]`.
        sources: Input token ids of each sequence: the encoder's, or the text of a decoder-only model.
        targets: Decoder target ids of each sequence; empty arrays unless spans are masked.
        requests: Number of each sequence in the stream, `[B]`: every sequence is a request of its own.
        documents: Documents of the user's text that this batch and those before it have begun.
    """

    number: int
    phase: str
    segments: tuple[str, ...]
    sources: list[IntArray]
    targets: list[IntArray]
    requests: IntArray
    documents: int = 0


def time_splits(count: int) -> list[str]:
    """Split of each of `count` batches, in time order: 58 % train, a gap, 12 % validation, a gap, the rest test."""
    gap = max(count // 30, 1) if count >= 12 else 0
    train, val = round(count * 0.58), round(count * 0.12)
    parts = ["train"] * train + ["gap"] * gap + ["val"] * val + ["gap"] * gap
    return (parts + ["test"] * count)[:count]


def sequences(documents: Iterable[Document], tokenizer: Any, length: int) -> Iterator[Row]:
    """Cuts documents into sequences of at most `length` tokens, in their order, and counts them."""
    numbered = enumerate(documents)
    while waiting := list(islice(numbered, TOKENIZED_AT_ONCE)):
        texts = [document.text for _, document in waiting]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (number, document), ids in zip(waiting, encoded, strict=True):
            if document.counts is not None:
                document.counts.used += len(ids) >= SHORTEST
                document.counts.too_short += len(ids) < SHORTEST
            for start in range(0, len(ids), length):
                if len(ids) - start >= SHORTEST:
                    yield Row(document.segment, np.asarray(ids[start : start + length], dtype=np.int64), number)


class Batcher:
    """Forms batches of a drawn size, or smaller if the token budget is used up; no sequence is reordered or lost.

    Args:
        tokenizer: The model's tokenizer.
        decode: "teacher" masks spans of the text as `span_corruption` does; otherwise text stays as it is, with an
            end-of-sequence token behind it.
        batching: Sizes, lengths and seed.
        causal: Whether the text is for a decoder-only model, which gets it without masks and end.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or no sentinel tokens where spans are to be masked.
    """

    def __init__(self, tokenizer: Any, decode: Decode, batching: BatchingConfig, causal: bool = False) -> None:
        self.batching, self.causal = batching, causal
        self._held: list[Row] = []
        self._requests = self._documents = 0
        self._eos, self._mask_spans = tokenizer.eos_token_id, decode == "teacher" and not causal
        if self._eos is None and not causal:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        if not self._mask_spans:
            return
        known = [tokenizer.convert_tokens_to_ids(f"<extra_id_{index}>") for index in range(100)]
        self._sentinels = np.array([idx for idx in known if idx is not None and idx != tokenizer.unk_token_id])
        if not len(self._sentinels):
            raise ValueError("the tokenizer has no <extra_id_0> to mask spans with; use --decode none or generate")

    def rng(self, number: int) -> np.random.Generator:
        """Random generator of one batch; it depends on seed and number only, so any batch can be formed again."""
        return np.random.default_rng((self.batching.seed, number))

    def form(self, number: int, phase: str, rows: Iterator[Row], rng: np.random.Generator) -> TextBatch | None:
        """Takes the next batch from `rows`; None if no row is left."""
        low, high = np.log([self.batching.smallest, self.batching.largest])
        taken = self._take(rows, round(float(np.exp(rng.uniform(low, high)))))
        if not taken:
            return None
        shaped = [self._shape(row.ids, rng) for row in taken]
        segments = tuple(row.segment for row in taken)
        self._documents = max(self._documents, *(row.document + 1 for row in taken))
        requests = np.arange(self._requests, self._requests + len(taken))
        self._requests += len(taken)
        sources, targets = [source for source, _ in shaped], [target for _, target in shaped]
        return TextBatch(number, phase, segments, sources, targets, requests, self._documents)

    def _take(self, rows: Iterator[Row], size: int) -> list[Row]:
        taken: list[Row] = []
        longest = 0
        while len(taken) < size:
            row = self._held.pop() if self._held else next(rows, None)
            if row is None:
                break
            longest = max(longest, len(row.ids) + 1)
            if self.batching.token_budget and taken and longest * (len(taken) + 1) > self.batching.token_budget:
                self._held.append(row)
                break
            taken.append(row)
        return taken

    def _shape(self, ids: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Returns encoder input and decoder target; the target is empty unless spans are masked."""
        if self._mask_spans:
            return corrupt(ids, self._sentinels, self._eos, rng)
        if self.causal:
            return ids, np.array([], dtype=np.int64)
        return np.append(ids[: self.batching.length - 1], self._eos), np.array([], dtype=np.int64)


def text_stream(
    documents: Iterable[Document], tokenizer: Any, decode: Decode, batching: BatchingConfig, causal: bool = False
) -> Iterator[TextBatch]:
    """Yields batches of the user's own text in its order, at most `batching.batches` of them; none without text."""
    batcher, rows = Batcher(tokenizer, decode, batching, causal), sequences(documents, tokenizer, batching.length)
    for number in range(batching.batches):
        batch = batcher.form(number, "text", rows, batcher.rng(number))
        if batch is None:
            return
        yield batch
