"""Atomic writing of files and folders (written under a temporary name, then renamed), JSON, and sha256 digests."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from data.errors import shown

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the text that Git LFS leaves in place of a file until the file is fetched."""


def cache_folder() -> Path:
    """Folder for downloads and converted weights: `$SWITCHCAST_CACHE`, by default `~/.cache/switchcast`."""
    return Path(os.environ.get("SWITCHCAST_CACHE", Path.home() / ".cache" / "switchcast"))


def check_fetched(path: Path) -> None:
    """Refuses a pointer that Git LFS left in place of a file.

    Raises:
        ValueError: If the file is one.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {path.parent}"
            )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it is renamed to `path` if the block succeeds and removed if it fails.

    Raises:
        OSError: Naming the file, if the disk is full, also where a library's error names none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        aside.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(aside)):
            raise
        raise OSError(error.errno, f"{path} cannot be written: {os.strerror(error.errno)}") from None
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[None]:
    """Creates a folder and holds its lock inside the block, so that no two processes write to it.

    Args:
        folder: The folder.
        wait: Whether to wait while another process holds it.

    Raises:
        ValueError: If another process holds it, unless `wait` is True.
    """
    import fcntl  # not on every system

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {folder}; wait until it has ended, or name another folder"
            ) from None
        yield
    finally:
        os.close(handle)  # which gives the lock back


def check_folder(path: Path) -> None:
    """Checks that a folder can be created or written to, before work whose result goes there; creates nothing.

    Raises:
        ValueError: If the path is a file, or the folder cannot be written to.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, expected a folder for the results; name another")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} is not writable; name another folder")


def check_file(path: Path) -> None:
    """Checks that a file can be written, before work whose result goes there; creates nothing.

    Raises:
        ValueError: If the path is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file for the results; name one in it")
    check_folder(path.parent)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document atomically."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text atomically."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON document.

    Raises:
        ValueError: If the file is missing, not a JSON object, or a pointer of Git LFS.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        check_fetched(path)
        raise ValueError(f"{path} is not JSON ({error}); it was edited or cut short") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {shown(document)}, expected a JSON object")
    return document


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_digest() -> str:
    """Digest of this project's own code, equal in processes that run the same code: 16 hex digits."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in ("data", "predictor", "runtime") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


def check_new(path: Path) -> None:
    """Checks, before work whose result goes there, that nothing exists at `path`.

    Raises:
        ValueError: If something does.
    """
    if path.exists():
        raise ValueError(f"{path} exists already; name another folder or remove it")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder; it is renamed to `path` if the block succeeds and removed if it fails.

    Raises:
        ValueError: If `path` exists already.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
        folder = Path(aside) / path.name
        folder.mkdir()
        yield folder
        check_new(path)  # another process may have written it meanwhile
        folder.rename(path)
