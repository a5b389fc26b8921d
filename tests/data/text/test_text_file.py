"""Files of text: what a document is, encodings, columns and cells, and what is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.text.text_file import BLOCK, TextFile

LINE = "Gemüse für Müller"


def texts(path, column=None):
    return [document.text for document in TextFile(path, path.name, column).documents()]


def test_blank_lines_end_paragraphs_and_without_them_lines_are_documents(tmp_path):
    (tmp_path / "prose.md").write_text("\n# A title\n\nfirst line\nsecond line\n \t\nanother\n\n")
    assert texts(tmp_path / "prose.md") == ["# A title", "first line\nsecond line", "another"]
    (tmp_path / "NOTES.TXT").write_text("\r\n one\r\ntwo \r\n\r\n")
    assert texts(tmp_path / "NOTES.TXT") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n\n")
    assert texts(tmp_path / "empty.txt") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_every_unicode_encoding_with_a_mark_is_the_same(encoding, tmp_path):
    (tmp_path / "a.txt").write_text(f"{LINE}\n{LINE}", encoding=encoding)
    (tmp_path / "a.csv").write_text(f"text,id\n{LINE},1\n", encoding=encoding)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": LINE}, ensure_ascii=False), encoding=encoding)
    (tmp_path / "a.json").write_text(json.dumps([{"text": LINE}], ensure_ascii=False), encoding=encoding)
    assert texts(tmp_path / "a.txt") == [LINE, LINE]
    assert texts(tmp_path / "a.csv") == texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.json") == [LINE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE.encode("latin-1"), r"a.txt is not UTF-8: byte 0xfc at position 3; convert it, as with `iconv -f"),
        (b"\xef\xbb\xbfabc\xe4", "byte 0xe4 at position 6"),
        (b"a" * (BLOCK - 1) + b"\xc3\xbcab\xff", f"byte 0xff at position {BLOCK + 3}"),
        (
            LINE.encode("utf-16-le"),
            "holds a NUL byte at position 1: it is UTF-16 without a byte-order mark, or no text",
        ),
        (LINE.encode("utf-16")[:-1], "is not UTF-16, as its byte-order mark says: byte 0x72"),
    ],
)
def test_another_encoding_is_named_with_its_first_byte(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextFile(tmp_path / "a.txt", "a.txt")


def test_cells_without_text_are_left_out_and_counted(tmp_path):
    rows = [{"url": "https://example.org", "text": text} for text in ("a real text", None, "", " ", 12, ["b"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"url": "x"}])))
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"url": "x"}]))
    for name in ("a.jsonl", "a.json"):
        file = TextFile(tmp_path / name, name)
        assert [document.text for document in file.documents()] == ["a real text"]
        counts = file.counts
        assert (counts.empty, counts.not_text, counts.wrong) == (4, 2, "row 5 holds the number 12")
    (tmp_path / "a.csv").write_text('id,text,author\n1,,Ann\n2,"one, two",Bob\n\n3\n')
    file = TextFile(tmp_path / "a.csv", "a.csv")
    assert [document.text for document in file.documents()] == ["one, two"]
    assert file.counts.empty == 2
    pq.write_table(pa.table({"id": ["x", "y"], "text": [None, "from parquet"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["from parquet"]


def test_another_column_is_read_by_name_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "7", "content": "some text"}\n')
    (tmp_path / "a.csv").write_text("id,content\n7,some text\n")
    pq.write_table(
        pa.table({"id": ["7"], "content": pa.array(["some text"]).dictionary_encode()}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert texts(tmp_path / name, "content") == ["some text"]
        with pytest.raises(ValueError, match=rf"{name} has no column 'text'; name one with --text-column: 'id', 'cont"):
            texts(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} has no column 'body'; name one of its columns: 'id', 'content'"):
            texts(tmp_path / name, "body")


def test_json_lines_in_a_json_file_are_read_as_such(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts(tmp_path / "a.json") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl, line 2 is not JSON: Expecting value"),
        ("broken.json", b'[{"text": "a"}', "broken.json is not JSON: Expecting"),
        ("list.jsonl", b"[1]", "list.jsonl, line 1 holds a list, expected an object with 'text'"),
        ("words.json", b'["a", "b"]', "words.json, row 1 holds a string, expected an object with 'text'"),
        ("nested.json", b'{"data": [{"text": "a"}]}', "nested.json has no column 'text'; .*: 'data'"),
        ("deep.json", b"[" * 100_000, "deep.json is not JSON: maximum recursion"),
        ("wrong.jsonl", b'{"text": {"a": 1}}', "column 'text' holds no text: row 1 holds an object"),
        ("open.csv", b'text\n"never closed\nand on', "open.csv, line 3 is not CSV: unexpected end of data"),
        ("twice.csv", b"text,text\na,b\n", "twice.csv has 2 columns 'text', expected one"),
        ("damaged.parquet", b"PAR1nonsense", "damaged.parquet cannot be read as Parquet"),
    ],
)
def test_what_is_not_laid_out_as_its_suffix_says_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'text' holds int64, expected strings"):
        texts(tmp_path / "a.parquet")
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no column 'text'; name one with --text-column: 'label'"):
        texts(tmp_path / "a.parquet")
