"""Bars are drawn at terminals; elsewhere nothing is written, not even an empty line."""

import io

import pytest
from rich.console import Console

from data.progress import progress, track


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    assert list(track(range(3), "counting", console=console)) == [0, 1, 2]
    with progress(console, transient=True) as bars:
        bars.advance(bars.add_task("working", total=1))
    drawn = console.file.getvalue()
    assert ("counting" in drawn and "working" in drawn) if terminal else drawn == ""


def test_no_console_is_no_bar(capsys):
    with progress(None) as bars:
        bars.add_task("working", total=1)
    assert capsys.readouterr() == ("", "")
