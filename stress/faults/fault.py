"""Fault: something that is done to the program, what is promised for it, and a check of what happens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Check = Callable[[Path], str]
"""Does it, with a folder of its own; returns what happened, and raises AssertionError if that was not promised."""


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name: Its name, for `--only`.
        done: What is done.
        promised: What the program promises.
        check: Does it.
    """

    name: str
    done: str
    promised: str
    check: Check
