"""Messages of errors as one line of bounded length: libraries write pages, and values from damaged files are long."""

import json
from typing import Any

LONGEST_LINE = 1000
LONGEST_VALUE = 40


def one_line(error: BaseException) -> str:
    """An error's whole message; the kind of error where it has none."""
    line = " ".join(str(error).split()) or type(error).__name__
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def shown(value: Any) -> str:
    """A value of a JSON or YAML document in the words of JSON, for messages: null, true, "text", a list of 3."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which names the reason; the kind of error where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
