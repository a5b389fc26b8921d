"""Checks of arguments from Python, which no command line has converted."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuses what is no whole number, or one out of bounds.

    Raises:
        ValueError: Naming the argument, its value and what was expected.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected a whole number, {bounds}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses what is none of some words.

    Raises:
        ValueError: Naming the argument, its value and the words.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
