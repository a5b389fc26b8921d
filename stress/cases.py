"""Case: a random case of a check, drawn from a seed, written in one line, and made smaller for as long as it fails.

@dataclass(frozen=True)
class Sum(Case):
    numbers: int = one_of(1, 2, 5)      # the simplest value first, which is the default
    sign: str = one_of("plus", "minus")

case = Sum.drawn(np.random.default_rng(0))
assert Sum.parse(str(case)) == case     # such as "seed=93,numbers=5,sign=minus"
smallest, error = shrunk(case, fails)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import numpy as np

MOST_TRIES = 400
"""Most cases that `shrunk` tries."""


def one_of(*values: Any) -> Any:
    """A field of a case, and its values, the simplest first; a value given twice is drawn twice as often."""
    return field(default=values[0], metadata={"values": values})


@dataclass(frozen=True)
class Case:
    """Values that say all about a case, together with a seed for what remains."""

    seed: int = 0

    @property
    def possible(self) -> bool:
        """Whether the values go together."""
        return True

    @classmethod
    def drawn(cls, rng: np.random.Generator, **fixed: Any) -> Self:
        """Draws a possible case; some values may be fixed."""
        choices = {each.name: each.metadata["values"] for each in fields(cls) if each.metadata} | {
            name: (value,) for name, value in fixed.items()
        }
        while True:
            values = {name: those[rng.integers(len(those))] for name, those in choices.items()}
            case = cls(int(rng.integers(2**31)), **values)
            if case.possible:
                return case

    def smaller(self) -> Iterator[Self]:
        """Possible cases of which one value is simpler, the simplest first."""
        for each in fields(self):
            for value in dict.fromkeys(each.metadata.get("values", ())):
                if value == getattr(self, each.name):
                    break
                case = replace(self, **{each.name: value})
                if case.possible:
                    yield case

    def __str__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        simplest = {each.name: each.default for each in fields(self) if each.metadata}
        return ",".join(f"{name}={value}" for name, value in values.items() if simplest.get(name) != value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what `str` wrote.

        Raises:
            ValueError: If a name or a value is unknown.
        """
        known: dict[str, Any] = {each.name: type(each.default) for each in fields(cls)}
        values: dict[str, Any] = {}
        for name, _, value in (part.partition("=") for part in text.split(",")):
            if name not in known:
                raise ValueError(f"{name!r} is no value of a {cls.__name__}, expected one of {', '.join(known)}")
            values[name] = known[name](value)
        return cls(**values)


AnyCase = TypeVar("AnyCase", bound=Case)


def shrunk(case: AnyCase, fails: Callable[[AnyCase], str]) -> tuple[AnyCase, str]:
    """The smallest failing case found by making one value after the other simpler, and its error.

    Args:
        case: A case that fails.
        fails: The error of a case, or "" if it passes.
    """
    error, tries = fails(case), 0
    found = True
    while found:
        found = False
        for candidate in case.smaller():
            tries += 1
            if tries > MOST_TRIES:
                return case, error
            if said := fails(candidate):
                case, error, found = candidate, said, True
                break
    return case, error
