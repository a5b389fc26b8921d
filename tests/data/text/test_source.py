"""The user's text: which files are read, in turn; what is said of the others; its identity."""

import json
import os

import pytest
from rich.console import Console

from data.models.model import load_model
from data.text import source
from data.text.batching import BatchingConfig
from data.text.corpus_stream import open_stream
from data.text.source import TextSource, open_text
from tests.conftest import TEXTS


def shown(text: TextSource) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(text.table())
    return capture.get()


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))


def test_files_of_a_folder_take_turns(tmp_path):
    write(tmp_path / "f", a=["a1", "a2", "a3"], b=["b1"], c=["c1", "c2"])
    (tmp_path / "f" / "sub").mkdir()
    (tmp_path / "f" / "sub" / "a.JSONL").write_text('{"text": "d1"}')
    found = [(document.segment, document.text) for document in TextSource(str(tmp_path / "f")).documents()]
    turns = [("a", "a1"), ("b", "b1"), ("c", "c1"), ("sub/a", "d1"), ("a", "a2"), ("c", "c2"), ("a", "a3")]
    assert found == turns


def test_of_many_files_as_many_are_open_as_may_be_and_none_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MOST_OPEN", 3)
    write(tmp_path / "f", **{f"f{n:02d}": [f"{n} one", f"{n} two"] for n in range(10)})
    found = [document.text for document in TextSource(str(tmp_path / "f")).documents()]
    assert sorted(found) == sorted(f"{n} {word}" for n in range(10) for word in ("one", "two"))
    assert found == [document.text for document in TextSource(str(tmp_path / "f")).documents()]
    assert found[:3] != ["0 one", "1 one", "2 one"], "a limit would else keep the last ones out"


def test_what_is_no_text_in_a_folder_is_left_out_and_said(tmp_path):
    folder = tmp_path / "dataset"
    write(folder, real=["some words"])
    (folder / "corpus.txt").mkdir()
    (folder / "corpus.txt" / "inner.txt").write_text("inner words")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.")
    (folder / "dataset_info.json").write_text('{"features": {}}')
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.txt").write_text("hidden")
    (folder / "model.bin").write_bytes(b"\0")
    (folder / "train.jsonl").write_text('{"text": "a row"}')
    text = TextSource(str(folder))
    assert {document.text for document in text.documents()} == {"some words", "inner words", "a row"}
    left = shown(text)
    for line in (
        "gone.txt (no file, or a link to nothing)", "pipe.txt (no file", "README.md (a data set's card)",
        "dataset_info.json (about a data set)", "2 other files (1 hidden, 1 .bin)",
    ):  # fmt: skip
        assert f"left out: {line}" in left
    (folder / "train.jsonl").unlink()
    assert "README.md" in TextSource(str(folder)).files, "beside no table it is text like any other"


def test_the_table_counts_every_document_of_every_file(tmp_path, switch_folder):
    (tmp_path / "f").mkdir()
    rows = [{"text": TEXTS[0]}, {"text": "short"}, {"text": None}, {"text": 5}, {"text": TEXTS[1]}]
    (tmp_path / "f" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "f" / "b.txt").write_text("\n".join(TEXTS * 20))
    text = TextSource(str(tmp_path / "f"))
    batching = BatchingConfig(batches=5, smallest=4, largest=4, length=32)
    list(open_stream(text, load_model(str(switch_folder)).tokenizer, "none", batching))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(text).splitlines() if "│" in line]
    assert ["a.jsonl", "2", "1", "1", "1", "to the end"] in cells
    (used,) = [row for row in cells if row[0] == "b.txt"]
    assert used[2:] == ["0", "0", "0", "in part"]
    assert 5 < int(used[1]) < 220
    assert ["all", str(2 + int(used[1])), "1", "1", "1", "in part"] in cells
    assert "a.jsonl: row 4 holds the number 5" in shown(text)


def test_text_that_gives_no_batch_says_why(tmp_path, switch_folder):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}')
    stream = open_stream(
        TextSource(str(tmp_path / "a.jsonl")), load_model(str(switch_folder)).tokenizer, "none", BatchingConfig()
    )
    with pytest.raises(ValueError, match=r"gives no batch \(1 too short, 1 empty\); expected a document of"):
        list(stream)


def test_a_digest_follows_content_names_and_column(tmp_path):
    write(tmp_path / "f", a=["one"], b=["two"])
    first = TextSource(str(tmp_path / "f"))
    assert TextSource(str(tmp_path / "f")).digest == first.digest
    assert first.files.keys() == {"a.txt", "b.txt"}
    assert TextSource(str(tmp_path / "f"), "body").digest != first.digest
    write(tmp_path / "f", b=["twa"])
    changed = TextSource(str(tmp_path / "f"))
    assert changed.digest != first.digest
    assert {name for name in first.files if first.files[name] != changed.files[name]} == {"b.txt"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.csv", "missing.csv does not exist; expected a text file"),
        ("model.bin", "holds no text in a known format; expected .txt, .md, .csv"),
        ("nothing", "holds no text in a known format; expected .txt"),
        ("pipe.txt", "is neither a file nor a folder, as a pipe or a device; save the text first"),
    ],
)
def test_what_is_no_text_is_refused(name, message, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\0\0")
    (tmp_path / "nothing").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=message):
        TextSource(str(tmp_path / name))


def test_a_column_needs_a_text_and_a_text_a_name():
    assert open_text(None, None) is None
    with pytest.raises(ValueError, match="text_column is 'body', but no text is given"):
        open_text(None, "body")
    with pytest.raises(ValueError, match="text is empty, expected a file"):
        open_text("", None)


def test_a_hub_data_set_is_known_by_its_commit_and_read_by_column(tmp_path, monkeypatch):
    """The builder of local rows stands for the hub's, which has the commit as its hash."""
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"id": "7", "text": "some text"}\n{"id": "8", "text": null}\n')
    builder = datasets.load_dataset_builder(
        "json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: asked.append(names) or builder)
    text = TextSource("owner/name:config:train")
    assert text.files == {"owner/name:config:train": builder.hash}
    assert [document.text for document in text.documents()] == ["some text"]
    assert text.counted() == "1 empty"
    assert asked == [("owner/name", "config")]
    with pytest.raises(
        ValueError, match="no text could be read from owner/name: it has no column 'body'; name one with"
    ):
        list(TextSource("owner/name", "body").documents())
