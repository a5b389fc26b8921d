"""EnginePlan: a plan as a file of an engine holds it, not judged yet; EngineFormat: how one engine writes and reads it.

A format is a file of this room with one class. It says what its engine does with each mistake, because engines accept
most of them without a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data.errors import shown
from runtime.balancing.plan_file import SavedPlan

Consequences = Mapping[str, str]
"""What an engine does with a mistake, by its kind: one of `MISTAKES`."""
MISTAKES = ("range", "empty", "missing", "twice", "length", "division", "layers")


@dataclass(frozen=True)
class EnginePlan:
    """The maps of a file, as its engine reads them.

    Attributes:
        engine: Name of the format.
        rows: Expert in each slot, by the number that the engine gives a layer.
        num_devices: Devices, where the file names them.
        num_slots: Slots of a layer, where the file names them.
        problems: What its reader found wrong already.
        notes: What the file does not say, and the engine needs.
        shared: Whether the only row is for every MoE layer.
    """

    engine: str
    rows: dict[int, list[int]]
    num_devices: int | None = None
    num_slots: int | None = None
    problems: Sequence[str] = field(default=())
    notes: Sequence[str] = field(default=())
    shared: bool = False


class EngineFormat(Protocol):
    """Writes and reads the plan file of one engine."""

    name: str
    suffix: str
    counts_dense: bool
    """Whether the engine numbers all layers of the model, dense ones too."""
    consequences: ClassVar[Consequences]

    def text(self, saved: SavedPlan) -> str:
        """The file for a plan without empty slots.

        Raises:
            ValueError: If the engine needs to know the layers' numbers, and the plan does not.
        """
        ...

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """Options of the engine that go with the file, then what else its user must know, a line each."""
        ...

    def read(self, document: Any) -> EnginePlan | None:
        """The plan in a document; None if it is another format's.

        Raises:
            ValueError: If it is this format, and damaged.
        """
        ...


def numbers_needed(saved: SavedPlan, engine: str) -> Sequence[int]:
    """The model's numbers of the planned layers.

    Raises:
        ValueError: If they are not known.
    """
    if saved.layers.numbers is None:
        raise ValueError(
            f"{engine} numbers all layers of a model, dense ones too, and the plan does not say which layers its "
            f"{len(saved.plan.phy2log)} rows are for; give --model FOLDER, or --hidden-layers and --layers, such as 61 "
            "and 3-60"
        )
    return saved.layers.numbers


def as_mapping(value: Any, name: str) -> dict[Any, Any]:
    """A mapping of a document.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, expected a mapping")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """A list of a document.

    Raises:
        ValueError: If it is something else, or empty.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {shown(value)}, expected a list")
    return value


def as_whole(value: Any, name: str, most: int) -> int:
    """A whole number of a document, 0 to `most`.

    Raises:
        ValueError: If it is something else.
    """
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number, 0 to {most}")
    return value
