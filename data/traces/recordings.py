"""Where recordings are: which files and folders are one recording each."""

import re
from pathlib import Path

TRACE_JSON = "trace.json"
DUMPS, STATISTICS, ROUTER_TRACES = "*.pt", "rank*.safetensors", "router_trace_rank*.jsonl"
PARTS = (TRACE_JSON, DUMPS, STATISTICS, ROUTER_TRACES)
"""Files by which a folder is one recording, not a folder of recordings."""
FILES = (".npy", ".npz", ".jsonl", ".pt")
"""Endings of files that are a recording each."""


def recordings(path: Path) -> list[Path]:
    """The recordings at a path: itself, or all files and folders in a folder that are recordings, in order of names,
    in which numbers count as numbers.

    Raises:
        ValueError: If a folder holds none.
    """
    if not path.is_dir() or _is_one(path):
        return [path]
    found = _within(path)
    if not found:
        raise ValueError(
            f"{path} holds no recording; expected files {', '.join(FILES)} or folders of {', '.join(PARTS)}"
        )
    return found


def _within(folder: Path) -> list[Path]:
    found = []
    for child in sorted(folder.iterdir(), key=_in_order):
        if child.is_dir():
            found += [child] if _is_one(child) else _within(child)
        elif child.suffix in FILES:
            found.append(child)
    return found


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers: part2 comes before part10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def _is_one(folder: Path) -> bool:
    return any(next(folder.glob(part), None) for part in PARTS)
