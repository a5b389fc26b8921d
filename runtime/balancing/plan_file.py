"""The plan file: a `ReplicationPlan` as one JSON document, with the model layers that it is for (docs/export.md).

    save_plan("plan.json", balancer.plan, PlannedLayers(range(3, 61), hidden_layers=61))
    load_plan("plan.json").plan.phy2log

A file is written whole or not at all, and verified when it is read: what is wrong is named in one line.

Shape suffixes: L MoE layers, E logical experts, P slots.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import MOST_EXPERTS, IntArray
from data.errors import shown
from data.files import check_fetched, write_text
from runtime.balancing.plan import EMPTY, ReplicationPlan

FORMAT, VERSION = "switchcast-plan", 1
KEYS = {"format", "version", "devices", "phy2log", "home_slots", "layers", "hidden_layers", "model", "fingerprint"}
MOST_BYTES = 16 << 20
"""Largest plan that is read: 61 layers of 288 slots take 0.1 MB."""
MOST_LAYERS = 2_000


@dataclass(frozen=True)
class PlannedLayers:
    """Which layers of which model a plan's rows are for; None and "" where it is not known.

    Attributes:
        numbers: Number of each planned MoE layer among all layers of the model, dense ones counted, ascending, `[L]`.
        hidden_layers: Layers of the model, dense ones counted.
        model: The model's name.
        fingerprint: The model's fingerprint (`MoELayout.fingerprint`).

    Raises:
        ValueError: If the numbers do not ascend, or lie outside of the model.
    """

    numbers: Sequence[int] | None = None
    hidden_layers: int | None = None
    model: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.hidden_layers is not None:
            _check_whole("hidden_layers", self.hidden_layers, 1, MOST_LAYERS)
        if self.numbers is None:
            return
        most = (self.hidden_layers or MOST_LAYERS) - 1
        for number in self.numbers:
            _check_whole("layers", number, 0, most)
        if list(self.numbers) != sorted(set(self.numbers)):
            raise ValueError(f"layers is {list(self.numbers)}, expected numbers of MoE layers in ascending order")
        object.__setattr__(self, "numbers", tuple(self.numbers))

    def check_size(self, num_layers: int) -> None:
        """Refuses numbers that are more or fewer than a plan's layers.

        Raises:
            ValueError: Naming both figures.
        """
        if self.numbers is not None and len(self.numbers) != num_layers:
            raise ValueError(f"layers holds {len(self.numbers)} numbers, the plan has {num_layers} MoE layers")
        if self.hidden_layers is not None and self.hidden_layers < num_layers:
            raise ValueError(f"hidden_layers is {self.hidden_layers}, the plan alone has {num_layers} MoE layers")


@dataclass(frozen=True)
class SavedPlan:
    """A plan and the layers that its rows are for."""

    plan: ReplicationPlan
    layers: PlannedLayers = PlannedLayers()

    def __post_init__(self) -> None:
        self.layers.check_size(len(self.plan.phy2log))


def save_plan(path: Path | str, plan: ReplicationPlan, layers: PlannedLayers | None = None) -> None:
    """Writes a plan, whole or not at all.

    Raises:
        ValueError: If the layers are not as many as the plan's.
        OSError: If the file cannot be written.
    """
    write_text(Path(path), plan_text(SavedPlan(plan, layers or PlannedLayers())))


def plan_text(saved: SavedPlan) -> str:
    """The plan file's text, a row of a map on each line."""
    plan, layers = saved.plan, saved.layers
    facts = {
        "format": FORMAT, "version": VERSION, "devices": plan.num_devices, "model": layers.model,
        "fingerprint": layers.fingerprint, "hidden_layers": layers.hidden_layers,
        "layers": None if layers.numbers is None else list(layers.numbers),
    }  # fmt: skip
    homes = "null" if plan.home_slots is None else rows_text(plan.home_slots.tolist())
    lines = [f'"{key}": {json.dumps(value)}' for key, value in facts.items()]
    lines += [f'"phy2log": {rows_text(plan.phy2log.tolist())}', f'"home_slots": {homes}']
    return "{" + ",\n ".join(lines) + "}\n"


def rows_text(rows: list[list[int]]) -> str:
    """Rows as JSON, one on each line."""
    return "[" + ",\n  ".join(map(json.dumps, rows)) + "]"


def load_plan(path: Path | str) -> SavedPlan:
    """Reads a plan file.

    Raises:
        ValueError: If it is missing, damaged, of another format or version, or no valid plan.
    """
    path = Path(path)
    document = read_document(path)
    if not is_plan(document):
        raise ValueError(f"{path} is no plan file: expected a JSON object with the format '{FORMAT}'")
    return plan_from(document, str(path))


def is_plan(document: Any) -> bool:
    """Whether a document calls itself a plan file."""
    return isinstance(document, dict) and document.get("format") == FORMAT


def plan_from(document: dict[str, Any], name: str) -> SavedPlan:
    """The plan in a plan file's document.

    Raises:
        ValueError: Naming the file and what is wrong.
    """
    if document.get("version") != VERSION:
        raise ValueError(f"{name} has version {shown(document.get('version'))}, expected {VERSION}; update Switchcast")
    if odd := sorted(document.keys() ^ KEYS):
        kind = "lacks" if odd[0] in KEYS else "has the unknown entry"
        raise ValueError(f"{name} {kind} '{odd[0]}'; expected {', '.join(sorted(KEYS))}")
    try:
        _check_whole("devices", document["devices"], 1, MOST_EXPERTS)
        for key in ("model", "fingerprint"):
            if not isinstance(document[key], str):
                raise ValueError(f"{key} is {shown(document[key])}, expected text")
        numbers, homes = document["layers"], document["home_slots"]
        if not (numbers is None or isinstance(numbers, list)):
            raise ValueError(f"layers is {shown(numbers)}, expected a list of layer numbers, or null")
        plan = ReplicationPlan(
            equal_rows(slot_rows(document["phy2log"], "phy2log")), document["devices"],
            None if homes is None else equal_rows(slot_rows(homes, "home_slots")),
        )  # fmt: skip
        return SavedPlan(
            plan, PlannedLayers(numbers, document["hidden_layers"], document["model"], document["fingerprint"])
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def read_document(path: Path) -> Any:
    """The JSON document of a plan, which may be of any kind.

    Raises:
        ValueError: If the file is missing, too large, or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}), expected a plan") from None


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a plan.

    Raises:
        ValueError: If the file is missing, a folder, too large, or no text.
    """
    check_size(path, most_bytes)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text ({error}), expected a plan; `switchcast export {path}` makes one of recorded loads"
        ) from None


def check_size(path: Path, most_bytes: int = MOST_BYTES) -> None:
    """Refuses a file that is missing, a folder, or too large for a plan.

    Raises:
        ValueError: If so, or where Git LFS left a pointer.
    """
    if not path.is_file():
        raise ValueError(f"{path} is a folder, expected a plan" if path.is_dir() else f"{path} does not exist")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{path} has {size:,} bytes, expected a plan of at most {most_bytes:,}")
    check_fetched(path)


def slot_rows(value: Any, name: str) -> list[list[int]]:
    """A list of rows of slots, each a list of expert ids, or -1 for an empty slot; rows may differ in length.

    Raises:
        ValueError: Naming the entry and the first thing that is no id.
    """
    if not isinstance(value, list) or not value or len(value) > MOST_LAYERS:
        size = f"{len(value)} rows" if isinstance(value, list) else shown(value)
        raise ValueError(f"{name} holds {size}, expected a list of 1 to {MOST_LAYERS} rows, one for each layer")
    return [slot_row(row, f"{name}, row {number}") for number, row in enumerate(value)]


def slot_row(row: Any, name: str) -> list[int]:
    """A list of expert ids, or -1 for an empty slot.

    Raises:
        ValueError: Naming the row and the first thing that is no id.
    """
    if not isinstance(row, list) or not row:
        raise ValueError(f"{name} is {shown(row)}, expected a list with the expert in each slot")
    for slot, expert in enumerate(row):
        if type(expert) is not int or not EMPTY <= expert < MOST_EXPERTS:
            raise ValueError(
                f"{name}, slot {slot} holds {shown(expert)}, expected an expert from 0 to {MOST_EXPERTS - 1}, or "
                "-1 for an empty slot"
            )
    return row


def equal_rows(rows: list[list[int]]) -> IntArray:
    """Rows as an array `[L, P]`.

    Raises:
        ValueError: If they differ in length.
    """
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} entries, row 0 has {len(rows[0])}; expected as many in each")
    return np.array(rows, dtype=np.int64)


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} holds {shown(value)}, expected a whole number, {least} to {most}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")
