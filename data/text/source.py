"""TextSource: the user's text (a file, a folder of files, a hub data set), its identity, and what was read of it.

Files of a folder take turns, one document each, so that a limit cuts all of them alike. Of more than `MOST_OPEN`
files as many are open at a time, in an order drawn from a fixed seed; fewer take their turns in the order of their
names. Hidden files, links to nothing, the metadata of data sets, and a README.md beside tables (a data set's card) are
left out; the table of `table` says so.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from data.errors import first_line
from data.text.document import Document, ReadCounts
from data.text.text_file import COLUMN, FORMATS, TABLES, TextFile

MOST_OPEN = 256
"""Files that are read from at the same time."""
MOST_SHOWN = 20
"""Files with a row of their own in the table."""
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files about a data set, which the hub and `datasets` write beside its rows."""
CARD = "readme.md"


class Part(Protocol):
    """A file, or a data set of the hub."""

    name: str
    counts: ReadCounts

    @property
    def digest(self) -> str:
        """What its content is known by."""

    def documents(self) -> Iterator[Document]:
        """Yields its documents in their order."""


class TextSource:
    """Text given by the user; opening it checks encodings and takes digests.

    Args:
        source: A file, a folder, or a hub data set `owner/name[:configuration[:split]]`.
        column: Column of text in tables; None takes `text`.

    Attributes:
        name: The source as it was given.
        column: The column as it was given.
        parts: The files that are read.
        left_out: What a folder holds beside them, in words.

    Raises:
        ValueError: If the source does not exist, or holds no text in a format that is read.
    """

    def __init__(self, source: str, column: str | None = None) -> None:
        self.name, self.column, self.left_out = source, column, list[str]()
        path = Path(source)
        self.parts: list[Part]
        if path.is_dir():
            self.parts = [TextFile(file, file.relative_to(path).as_posix(), column) for file in self._find(path)]
        elif path.exists():
            if not path.is_file():
                raise ValueError(f"{source} is neither a file nor a folder, as a pipe or a device; save the text first")
            if path.suffix.lower() not in FORMATS:
                raise _no_text(source)
            self.parts = [TextFile(path, path.name, column)]
        elif source.startswith((".", "/", "~")) or path.suffix.lower() in FORMATS:
            raise ValueError(f"{source} does not exist; expected a text file, a folder of them, or a hub data set")
        else:
            self.parts = [HubText(source, column)]

    def _find(self, folder: Path) -> list[Path]:
        found, others = list[Path](), Counter[str]()
        for path in sorted(folder.rglob("*")):
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
            if path.is_dir():
                continue
            if hidden or path.suffix.lower() not in FORMATS:
                others["hidden" if hidden else path.suffix or path.name] += 1
            elif not path.is_file():
                self.left_out.append(f"{path.relative_to(folder)} (no file, or a link to nothing)")
            elif path.name in METADATA:
                self.left_out.append(f"{path.relative_to(folder)} (about a data set)")
            else:
                found.append(path)
        if any(path.suffix.lower() in TABLES for path in found):
            cards = [path for path in found if path.name.lower() == CARD]
            self.left_out += [f"{path.relative_to(folder)} (a data set's card)" for path in cards]
            found = [path for path in found if path not in cards]
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
            self.left_out.append(f"{others.total()} other files ({kinds})")
        if not found:
            raise _no_text(str(folder))
        return found

    @property
    def files(self) -> dict[str, str]:
        """Digest of each file, by name: sha256 of its bytes; of a hub data set the commit."""
        return {part.name: part.digest for part in self.parts}

    @property
    def digest(self) -> str:
        """One digest of column, files and their names."""
        return hashlib.sha256(json.dumps([self.column, self.files]).encode()).hexdigest()

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yields the documents; files take turns.

        Args:
            skip: Documents at the beginning that are left out, because a predictor was trained on them.

        Raises:
            ValueError: If a file is damaged, or has no such column.
        """
        for number, document in enumerate(self._in_turn()):
            if number >= skip:
                yield document
            elif document.counts is not None:
                document.counts.trained_on += 1

    def _in_turn(self) -> Iterator[Document]:
        order = list(range(len(self.parts)))
        if len(order) > MOST_OPEN:
            order = np.random.default_rng(0).permutation(order).tolist()
        waiting = deque(self.parts[index] for index in order)
        turns = deque[Iterator[Document]]()
        while turns or waiting:
            while waiting and len(turns) < MOST_OPEN:
                turns.append(waiting.popleft().documents())
            own = turns.popleft()
            if (document := next(own, None)) is not None:
                yield document
                turns.append(own)

    def counted(self) -> str:
        """What became of the documents that were read, in words."""
        total = _sum([part.counts for part in self.parts])
        counts = {
            "used": total.used, "too short": total.too_short, "empty": total.empty, "not text": total.not_text,
            "trained on": total.trained_on,
        }  # fmt: skip
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no documents"

    def table(self) -> Table:
        """What was read of each file: documents used, those left out and why, and whether all of it was needed."""
        files = {part.name: part.counts for part in self.parts}
        shown = dict(list(files.items())[:MOST_SHOWN])
        if rest := list(files.values())[MOST_SHOWN:]:
            shown[f"{len(rest)} more files"] = _sum(rest)
        if len(files) > 1:
            shown["all"] = _sum(list(files.values()))
        with_training = any(own.trained_on for own in files.values())
        names = ["file", "documents used", "empty", "not text", "too short", *["trained on"] * with_training, "read"]
        notes = [f"{name}: {own.wrong}" for name, own in files.items() if own.wrong][:MOST_SHOWN]
        notes += [f"left out: {what}" for what in self.left_out[:MOST_SHOWN]]
        made = Table(*names, title=f"Text of {self.name}", caption="\n".join(notes) or None, caption_justify="left")
        for name, own in shown.items():
            numbers = [own.used, own.empty, own.not_text, own.too_short, *[own.trained_on] * with_training]
            made.add_row(name, *(f"{number:,}" for number in numbers), "to the end" if own.finished else "in part")
        return made


class HubText:
    """A data set of the Hugging Face hub, read as a stream; the hub is asked when it is needed.

    Args:
        source: `owner/name[:configuration[:split]]`.
        column: Column of text; None takes `text`.
    """

    def __init__(self, source: str, column: str | None = None) -> None:
        self.name, self.column, self.counts = source, column or COLUMN, ReadCounts()
        self._segment, self._config, split = (*source.split(":"), "", "")[:3]
        self._split = split or "train"

    @cached_property
    def _builder(self) -> Any:
        try:
            import datasets

            return datasets.load_dataset_builder(self._segment, self._config or None)
        except ImportError:
            raise ValueError(
                f"{self.name} is no file or folder; hub data sets need the package datasets (pip install datasets)"
            ) from None
        except Exception as error:  # errors of datasets, requests and the hub
            raise _unread(self.name, error) from None

    @property
    def digest(self) -> str:
        """Commit of its repository: files that it links to elsewhere are not seen.

        Raises:
            ValueError: If there is no such data set, or the hub cannot be reached.
        """
        return str(self._builder.hash)

    def documents(self) -> Iterator[Document]:
        """Yields the texts of the rows.

        Raises:
            ValueError: If they cannot be read, or have no such column.
        """
        builder = self._builder
        try:
            for number, row in enumerate(builder.as_streaming_dataset(split=self._split), 1):
                if self.column not in row:
                    names = ", ".join(map(repr, row))
                    raise LookupError(f"it has no column '{self.column}'; name one with --text-column: {names}")
                cell = row[self.column]
                if isinstance(cell, str) and cell.strip():
                    self.counts.given += 1
                    yield Document(self._segment, cell, self.counts)
                elif cell is None or isinstance(cell, str):
                    self.counts.empty += 1
                else:
                    self.counts.not_text += 1
                    self.counts.wrong = self.counts.wrong or f"row {number} holds a {type(cell).__name__}"
        except Exception as error:  # errors of datasets, pyarrow, pandas and the hub
            raise _unread(self.name, error) from None
        self.counts.ended = True


def open_text(text: str | None, column: str | None) -> TextSource | None:
    """The user's text; None without one.

    Raises:
        ValueError: If there is a column and no text, or the text cannot be used; see `TextSource`.
    """
    if text is None:
        if column is not None:
            raise ValueError(f"text_column is '{column}', but no text is given; add --text, or leave it out")
        return None
    if not text:
        raise ValueError("text is empty, expected a file, a folder or a hub data set; leave --text out for the corpus")
    return TextSource(text, column)


def _sum(parts: list[ReadCounts]) -> ReadCounts:
    names = ("used", "too_short", "empty", "not_text", "trained_on", "given")
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return ReadCounts(**sums, ended=all(part.ended for part in parts))


def _no_text(source: str) -> ValueError:
    return ValueError(f"{source} holds no text in a known format; expected {', '.join(FORMATS)}")


def _unread(name: str, error: Exception) -> ValueError:
    return ValueError(f"no text could be read from {name}: {first_line(error)}")
