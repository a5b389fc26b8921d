"""The text of a run as batches, the user's or the offline corpus, kept to what the predictor was not trained on.

A predictor folder records the files, by digest, and how many of their documents lie in batches for training and
validation (`trained_on` in config.json). The same files in the same order are read from behind these documents. Where
that does not help, the run says that its text is not held out.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.models.generation import padding_id
from data.text.batching import BatchingConfig
from data.text.corpus import OFFLINE
from data.text.corpus_stream import corpus_splits, open_stream
from data.text.source import TextSource
from data.traces.trace import TokenBatch
from data.traces.tracer import input_tokens, model_inputs
from predictor.checkpoint import CONFIG, local_folder, read_config
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine

UNKNOWN = "the predictor does not record which text it was trained on; this text may be part of it"


@dataclass(frozen=True)
class HeldOut:
    """Whether the predictor was not trained on the text of a run.

    Attributes:
        known: True if it was not; False if it was on some of it; None if that is not known, or there is no predictor.
        note: Why, in one sentence; empty if there is nothing to say.
        skip: Documents at the beginning of the text to leave out.
    """

    known: bool | None
    note: str = ""
    skip: int = 0


def held_out(predictor: Path | None, source: TextSource | None, batching: BatchingConfig) -> HeldOut:
    """Compares the text of a run with the text that its predictor was trained on.

    Args:
        predictor: Folder of the predictor, or None.
        source: The user's text; None is the offline corpus.
        batching: How the run cuts text into batches.
    """
    if predictor is None:
        return HeldOut(None)
    trained = _trained_on(predictor)
    name = trained.get("text")
    if source is None:
        if name is None:
            return HeldOut(None, UNKNOWN)
        changed = [key for key, value in asdict(batching).items() if trained["batching"].get(key) != value]
        if name != OFFLINE or not changed:
            return HeldOut(True)
        note = f"the predictor was trained on the offline corpus with another --batching.{changed[0]}"
        return HeldOut(False, f"{note}; batches of this run may hold text of its training batches")
    if name == OFFLINE:
        return HeldOut(True)
    if "text_files" not in trained:
        return HeldOut(None, UNKNOWN)
    seen, files = list(trained["text_files"].values()), list(source.files.values())
    if not set(seen) & set(files):
        return HeldOut(True)
    if seen == files and trained.get("text_column") == source.column:
        skip = trained["held_out_from"]
        return HeldOut(True, f"the predictor was trained on the first {skip:,} documents of this text, left out", skip)
    shared = sum(digest in set(seen) for digest in files)
    which = f"{shared} of these {len(files)} files" if len(files) > 1 else "this file"
    return HeldOut(False, f"the predictor was trained on {which}, among others or in another column; all of it is read")


def _trained_on(predictor: Path) -> dict[str, Any]:
    """What config.json says about the text of the training trace; empty in folders of earlier versions.

    Raises:
        ValueError: If it says something else.
    """
    trained: Any = read_config(local_folder(predictor)).get("trained_on", {})
    kinds: dict[str, type] = {"text": str, "batching": dict, "text_files": dict, "held_out_from": int}
    if not isinstance(trained, dict) or any(
        not isinstance(trained.get(key, kind()), kind) for key, kind in kinds.items()
    ):
        raise ValueError(
            f"{predictor / CONFIG}: trained_on is {trained!s:.80}; it was edited, train the predictor again"
        )
    return {"batching": {}} | ({"held_out_from": 0} if "text_files" in trained else {}) | trained


def text_batches(
    engine: Engine, source: TextSource | None, batching: BatchingConfig, count: int, skip: int = 0
) -> Iterator[tuple[str, ModelBatch]]:
    """Phase and inputs of each batch.

    By default they are the offline corpus' held-out batches from where the topic always changes.
    """
    causal, config = engine.loaded.layout.causal, engine.loaded.model.config
    stream = open_stream(source, engine.loaded.tokenizer, "teacher", batching, causal, skip)
    if source is None:
        splits = corpus_splits(batching)
        stream = (batch for batch in stream if splits[batch.number] == "test" and batch.phase in ("every_1", "unseen"))
    for batch in islice(stream, count):
        tokens: tuple[TokenBatch, ...] = (
            (input_tokens(batch, padding_id(config)),) if causal else model_inputs(batch, config)
        )
        engine.loaded.check_ids(*(each.input_ids for each in tokens))
        yield batch.phase, ModelBatch(*tokens)
