"""RequestCounts: what a GPU was asked to do while CUDA was pretended, each request with the line of code behind it."""

import sys
import threading
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("runtime", "data", "predictor", "switchcast", "benchmarks"))
TESTS, TRANSFORMERS = f"{ROOT}/tests/", "/site-packages/transformers/"

KERNEL = "kernel"
UPLOAD, PAGEABLE_UPLOAD, DOWNLOAD = "upload", "pageable upload", "download"
SYNC = "sync"
TIMING_EVENT, PIN, COLLECTIVE = "timing event", "pin", "collective"
KINDS = (KERNEL, UPLOAD, PAGEABLE_UPLOAD, DOWNLOAD, SYNC, TIMING_EVENT, PIN, COLLECTIVE)


def call_site() -> str:
    """The innermost line of this project, of transformers or of a test: 'runtime/experts/layer.py:132'."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGES) or (name.startswith(TESTS) and "/test_" in name):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if TRANSFORMERS in name:
            return f"transformers/{name.split(TRANSFORMERS)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class RequestCounts:
    """Counts requests by kind (one of `KINDS`), name and call site; any thread may add to it.

    Attributes:
        by_key: Number of requests by (kind, name, site).
    """

    def __init__(self) -> None:
        self.by_key: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str, name: str, number: int = 1) -> None:
        """Counts a request of the calling code."""
        assert kind in KINDS, f"{kind} is no kind of request; expected one of {KINDS}"
        with self._lock:
            self.by_key[kind, name, call_site()] += number

    def total(self, kind: str, name: str = "", site: str = "") -> int:
        """Number of requests of a kind whose name and call site contain the given text."""
        return sum(number for (k, n, s), number in self._items() if k == kind and name in n and site in s)

    def by_site(self, kind: str, site: str = "") -> dict[str, int]:
        """Number of requests of a kind at each call site that contains the given text."""
        sites: Counter[str] = Counter()
        for (k, _, s), number in self._items():
            if k == kind and site in s:
                sites[s] += number
        return dict(sites)

    def by_name(self, kind: str) -> dict[str, int]:
        """Number of requests of a kind by name."""
        names: Counter[str] = Counter()
        for (k, n, _), number in self._items():
            if k == kind:
                names[n] += number
        return dict(names)

    def snapshot(self) -> "RequestCounts":
        """What has been counted so far."""
        copy = RequestCounts()
        copy.by_key.update(dict(self._items()))
        return copy

    def reset(self) -> None:
        """Forgets everything counted so far."""
        with self._lock:
            self.by_key.clear()

    def __str__(self) -> str:
        rows = sorted((kind, site, name, number) for (kind, name, site), number in self._items())
        return "\n".join(f"{number:6} {kind:16} {name:32} {site}" for kind, site, name, number in rows)

    def _items(self) -> list[tuple[tuple[str, str, str], int]]:
        with self._lock:
            return list(self.by_key.items())


COUNTS = RequestCounts()
"""Of the `pretending` context that is open."""
