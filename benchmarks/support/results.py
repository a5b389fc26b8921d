"""Results: a folder that `make bench` or `make gpu` wrote, as programs read it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from data.files import read_json


class Results:
    """One folder.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it holds no results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "summary.json").is_file():
            raise ValueError(f"{folder} has no summary.json; expected a folder that `make bench` or `make gpu` wrote")
        self.summary: dict[str, Any] = read_json(folder / "summary.json")

    @cached_property
    def documents(self) -> dict[str, Any]:
        """The JSON document of each step that is ok and printed one, by the step's name."""
        paths = {step["name"]: self.folder / f"{step['name']}.json" for step in self.summary["steps"]}
        ok = {step["name"] for step in self.summary["steps"] if step["status"] == "ok"}
        return {name: read_json(path) for name, path in paths.items() if name in ok and path.is_file()}

    def document(self, step: str) -> dict[str, Any]:
        """A step's JSON document.

        Raises:
            ValueError: If the step failed or was not run.
        """
        if step not in self.documents:
            raise ValueError(f"{self.folder} has no results of the step {step}; run it, and see its .log if it failed")
        found: dict[str, Any] = self.documents[step]
        return found

    def command(self, step: str) -> str:
        """The command of a step, as it is typed."""
        return next(str(item["command"]) for item in self.summary["steps"] if item["name"] == step)

    @property
    def hardware(self) -> str:
        """GPUs, or cores and processor, and torch's version, in words."""
        machine = self.summary["machine"]
        where = ", ".join(dict.fromkeys(machine["devices"])) or f"{machine['cores']} cores of {machine['processor']}"
        return f"{where}, torch {machine['libraries']['torch']}"


def figures(document: Any, name: str = "") -> dict[str, float]:
    """Every number of a JSON document, by the path that leads to it: `arms.lru.seconds`, `rows.0.gain`."""
    if isinstance(document, bool) or document is None or isinstance(document, str):
        return {}
    if isinstance(document, (int, float)):
        return {name: float(document)}
    items = document.items() if isinstance(document, dict) else enumerate(document)
    prefix = f"{name}." if name else ""
    return {path: value for key, item in items for path, value in figures(item, f"{prefix}{key}").items()}
