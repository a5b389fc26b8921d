"""Runs a command of the project in a process of its own, on a small disk if need be."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; negative for a signal.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        seconds: How long it took.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def line(self) -> str:
        """The last line of stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    def refused(self) -> str:
        """Its one error line; raises AssertionError if it ended otherwise than with exit code 2 and one line."""
        assert self.code == 2, f"exit code {self.code}: {self.err[-1500:]}"
        assert "Traceback" not in self.err, self.err[-1500:]
        assert self.line.startswith("error: "), self.line
        return self.line.removeprefix("error: ")

    def succeeded(self) -> "Ended":
        """Itself; raises AssertionError if the exit code is not 0."""
        assert self.code == 0, f"exit code {self.code}: {self.err[-1500:]}"
        return self


def command(module: str, *words: object, before: str = "") -> list[str]:
    """The command line of `python -m module`; `before` is a `module:function` that is called first, in its process."""
    if not before:
        return [sys.executable, "-m", module, *map(str, words)]
    where, _, function = before.partition(":")
    script = (
        f"import runpy, sys\nfrom {where} import {function}\n{function}()\nsys.argv = [{module!r}, *sys.argv[1:]]\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", script, *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: this project first on the path, one thread, no hub."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def run(module: str, *words: object, folder: Path, before: str = "", timeout_s: float = 300.0, **more: str) -> Ended:
    """Runs a command in a folder; AssertionError if it hangs."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            command(module, *words, before=before), cwd=folder, env=environment(**more), capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"hangs: not ended after {timeout_s:.0f} s; {error.stderr!r:.1500}") from None
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB, mounted in a folder.

    Raises:
        NotImplementedError: If this process may not mount one.
    """
    place = folder / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        raise NotImplementedError(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_room(disk: Path) -> None:
    """Gives a small disk 256 MiB."""
    subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True, capture_output=True)


def files(folder: Path) -> list[str]:
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
