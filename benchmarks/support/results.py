"""Results: a folder that `make bench`, one of its kind or `make gpu` wrote, as programs read it."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from data.files import read_json

BENCH, LONG, SETTINGS, GPU = (f"make {name}" for name in ("bench", "bench-long", "bench-settings", "gpu"))
"""Commands that write folders."""


class Results:
    """One folder.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it holds no results.

    Attributes:
        steps: Steps of the summary, by name.
        hardware: GPUs, or cores and processor, and torch's version, in words.
        commit: The commit that was measured.
        command: The command that wrote it, such as `BENCH`.
        names: Steps that are ok and have a document.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "summary.json").is_file():
            raise ValueError(f"{folder} has no summary.json; expected a folder that `make bench` or `make gpu` wrote")
        summary = read_json(folder / "summary.json")
        try:
            self.steps = {step["name"]: step for step in summary["steps"]}
            facts = summary["machine"]
            where = ", ".join(dict.fromkeys(facts["devices"])) or f"{facts['cores']} cores of {facts['processor']}"
            self.hardware = f"{where}, torch {facts['libraries']['torch']}"
            self.commit, self.command = str(facts["commit"]), str(summary.get("command", BENCH))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}/summary.json is no summary ({error!r}); expected that of `make bench` or `make gpu`"
            ) from None
        self.names = [name for name, step in self.steps.items() if self._is_ok(name, step)]

    def _is_ok(self, name: str, step: dict[str, Any]) -> bool:
        return step.get("status") == "ok" and (self.folder / f"{name}.json").is_file()

    @property
    def measured(self) -> str:
        """The commit and the hardware, and how many steps were measured again at a later commit, in words."""
        again = sum("again" in step for step in self.steps.values())
        later = f" ({again} of {len(self.steps)} steps later)" if again else ""
        return f"at commit {self.commit[:8]}{later} on {self.hardware}"

    def document(self, step: str) -> dict[str, Any]:
        """A step's JSON document.

        Raises:
            ValueError: If the step failed or was not run, or its file is damaged.
        """
        if step not in self.names:
            raise ValueError(f"{self.folder} has no results of the step {step}; run it, and see its .log if it failed")
        return read_json(self.folder / f"{step}.json")

    def value(self, step: str, read: Callable[[dict[str, Any]], float]) -> float:
        """A figure of a step's document.

        Raises:
            ValueError: If the document does not hold it.
        """
        try:
            return read(self.document(step))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.folder}/{step}.json does not hold what the step prints ({error!r})") from None


def figures(document: Any, name: str = "") -> dict[str, float]:
    """Every finite number of a JSON document, by the path that leads to it: `arms.lru.seconds`, `rows.0.gain`."""
    if isinstance(document, bool) or document is None or isinstance(document, str):
        return {}
    if isinstance(document, (int, float)):
        return {name: float(document)} if isfinite(document) else {}
    items = document.items() if isinstance(document, dict) else enumerate(document)
    prefix = f"{name}." if name else ""
    return {path: value for key, item in items for path, value in figures(item, f"{prefix}{key}").items()}
