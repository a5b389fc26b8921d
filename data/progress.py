"""Progress bars on standard error, at a terminal only: elsewhere rich writes an empty line when a bar ends."""

from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")


def progress(console: Console | None, transient: bool = False) -> Progress:
    """Bars for a `with` block; none is drawn where the console is None or no terminal.

    Args:
        console: Where they are drawn.
        transient: Whether they vanish at the end.
    """
    return Progress(console=console, transient=transient, disable=console is None or not console.is_interactive)


def track(
    items: Iterable[Item], description: str, total: float | None = None, console: Console | None = None
) -> Iterable[Item]:
    """The items, with a bar that moves as they are taken; none is drawn where no terminal is.

    Args:
        items: What is gone through.
        description: Text before the bar.
        total: Number of items; by default their length.
        console: Where it is drawn; by default standard error.
    """
    console = console or Console(stderr=True)
    return rich.progress.track(items, description, total, console=console, disable=not console.is_interactive)
