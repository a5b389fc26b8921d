"""Checks of arguments from Python, which no command line has converted."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuses what is no whole number, or too small a one.

    Raises:
        ValueError: Naming the argument, its value and what was expected.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number, {least} or more")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses what is none of some words.

    Raises:
        ValueError: Naming the argument, its value and the words.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
