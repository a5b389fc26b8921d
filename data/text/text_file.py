"""TextFile: a file of text, checked when it is opened, and its documents.

| suffix, in either case | documents |
|---|---|
| `.txt`, `.md` | paragraphs, which blank lines end; without a blank line between its lines, each line of the file |
| `.csv`, `.json`, `.jsonl`, `.parquet` | cells of one column, by name |

Cells that are null, empty, or hold something other than text are counted and left out. Text is UTF-8, or UTF-16 or
UTF-32 with a byte-order mark. `.json` is a list of objects, or one object in each line.
"""

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import first_line
from data.text.document import Document, ReadCounts

COLUMN = "text"
"""Column that is read unless another is named."""
LINES, TABLES = (".txt", ".md"), (".csv", ".json", ".jsonl", ".parquet")
FORMATS = LINES + TABLES
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""Byte-order marks and the codec that each stands for; that of UTF-16 begins that of UTF-32."""
BLOCK = 1 << 20
"""Bytes that are checked at a time."""
ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""
EXAMINED = 100
"""Rows of a JSON file of which at least one must have the column."""
Rows = Iterator[dict[str, Any]]


class TextFile:
    """One file; opening it reads all its bytes once.

    Args:
        path: The file.
        name: Its name in the source; without the suffix it is the segment of its documents.
        column: Column of text; None takes `COLUMN`.

    Attributes:
        digest: sha256 of its bytes.
        counts: What became of its documents so far.

    Raises:
        ValueError: If its text is in another encoding, or it is no text.
    """

    def __init__(self, path: Path, name: str, column: str | None = None) -> None:
        self.path, self.name, self.column, self.counts = path, name, column or COLUMN, ReadCounts()
        self._segment = Path(name).with_suffix("").as_posix()
        self._asked = column is not None
        self._suffix = path.suffix.lower()
        self._encoding = "" if self._suffix == ".parquet" else _encoding(path)
        self.digest = _checked(path, self._encoding)

    def documents(self) -> Iterator[Document]:
        """Yields the documents in the order of the file.

        Raises:
            ValueError: If the file is damaged, has no such column, or no text in it.
        """
        for text in self._paragraphs() if self._suffix in LINES else self._cells():
            self.counts.given += 1
            yield Document(self._segment, text, self.counts)
        self.counts.ended = True

    def _paragraphs(self) -> Iterator[str]:
        together = self._has_paragraphs()
        with self.path.open(encoding=self._encoding) as lines:
            for blank, group in groupby(lines, key=lambda line: not line.strip()):
                if not blank:
                    yield from ["".join(group).strip()] if together else (line.strip() for line in group)

    def _has_paragraphs(self) -> bool:
        """Whether a blank line lies between two lines."""
        with self.path.open(encoding=self._encoding) as lines:
            runs = (run for run, _ in groupby(lines, key=lambda line: not line.strip()) if not run)
            return any(True for _ in islice(runs, 1, None))

    def _cells(self) -> Iterator[str]:
        readers: dict[str, Callable[[], Rows]] = {
            ".csv": self._csv, ".json": self._json, ".jsonl": self._json_lines, ".parquet": self._parquet
        }  # fmt: skip
        found = 0
        for number, row in enumerate(readers[self._suffix](), 1):
            cell = row.get(self.column)
            if isinstance(cell, str) and cell.strip():
                found += 1
                yield cell
            elif cell is None or isinstance(cell, str):
                self.counts.empty += 1
            else:
                self.counts.not_text += 1
                self.counts.wrong = self.counts.wrong or f"row {number} holds {_kind(cell)}"
        if self.counts.not_text and not found:
            raise ValueError(f"{self.path}: column '{self.column}' holds no text: {self.counts.wrong}")

    def _check_columns(self, names: list[str]) -> None:
        if names.count(self.column) == 1:
            return
        if self.column in names:
            raise ValueError(f"{self.path} has {names.count(self.column)} columns '{self.column}', expected one")
        mend = "name one of its columns" if self._asked else "name one with --text-column"
        raise ValueError(f"{self.path} has no column '{self.column}'; {mend}: {', '.join(map(repr, names)) or 'none'}")

    def _csv(self) -> Rows:
        csv.field_size_limit(sys.maxsize)
        with self.path.open(encoding=self._encoding, newline="") as file:
            rows = csv.reader(file, strict=True)
            try:
                if (header := next(rows, None)) is None:
                    return
                self._check_columns(header)
                for row in rows:
                    if row:  # else a blank line
                        yield dict(zip(header, row, strict=False))
            except csv.Error as error:
                raise ValueError(f"{self.path}, line {rows.line_num} is not CSV: {error}") from None

    def _parquet(self) -> Rows:
        try:
            with pq.ParquetFile(self.path) as file:
                schema = file.schema_arrow
                self._check_columns(schema.names)
                kind = schema.field(self.column).type
                values = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_null(values)):
                    raise ValueError(f"{self.path}: column '{self.column}' holds {kind}, expected strings")
                for batch in file.iter_batches(ROWS, columns=[self.column]):
                    yield from batch.select([self.column]).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {first_line(error)}") from None

    def _json(self) -> Rows:
        text = self.path.read_text(encoding=self._encoding)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):
                raise ValueError(f"{self.path} is not JSON: {error}") from None
            yield from self._json_lines()
            return
        rows = enumerate(document if isinstance(document, list) else [document], 1)
        yield from self._objects((f"row {number}", row) for number, row in rows)

    def _json_lines(self) -> Rows:
        with self.path.open(encoding=self._encoding) as lines:
            yield from self._objects(self._parsed(lines))

    def _parsed(self, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path}, line {number} is not JSON: {error}") from None

    def _objects(self, rows: Iterator[tuple[str, Any]]) -> Rows:
        """The rows, refused if one is no object, or none of the first ones has the column."""
        without: list[dict[str, Any]] | None = []
        for place, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}, {place} holds {_kind(row)}, expected an object with '{self.column}'")
            if without is not None:
                without = None if self.column in row else [*without, row]
            if without and len(without) == EXAMINED:
                break
            yield row
        if without:
            self._check_columns(list(dict.fromkeys(name for row in without for name in row)))


def _kind(value: Any) -> str:
    """What a cell holds, in a few words."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a string"}
    return names.get(type(value)) or f"the number {value!s:.20}"


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    return next((codec for mark, codec in MARKS if head.startswith(mark)), "utf-8")


def _checked(path: Path, encoding: str) -> str:
    """sha256 of the bytes, which must be text in that encoding; "" does not look into them.

    Raises:
        ValueError: Naming the first byte that is not.
    """
    codec = encoding.removesuffix("-sig")  # which would count from behind the mark
    digest, at, decoder = sha256(), 0, codecs.getincrementaldecoder(codec)() if codec else None
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            digest.update(block)
            if codec == "utf-8" and b"\0" in block:
                raise ValueError(
                    f"{path} holds a NUL byte at position {at + block.index(0)}: it is UTF-16 without a byte-order "
                    "mark, or no text; save it as UTF-8, or leave it out"
                )
            if decoder is not None:
                waiting = len(decoder.getstate()[0])
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _not_text(path, encoding, error.object[error.start], at - waiting + error.start) from None
            if not block:
                return digest.hexdigest()
            at += len(block)


def _not_text(path: Path, encoding: str, byte: int, place: int) -> ValueError:
    found = f"byte 0x{byte:02x} at position {place}"
    if encoding.startswith("utf-8"):
        mend = f"convert it, as with `iconv -f WINDOWS-1252 -t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}`"
        return ValueError(f"{path} is not UTF-8: {found}; {mend}")
    return ValueError(f"{path} is not {encoding.upper()}, as its byte-order mark says: {found}; save it as UTF-8")
