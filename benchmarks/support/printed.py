"""Tables that a step printed, as Markdown below the command that printed them."""

import re

from benchmarks.support.results import Results
from benchmarks.support.steps import in_shell
from predictor.evaluation.tables import markdown

TABLE = re.compile(
    r"(?P<title>(?:^ +\S.*\n)*)"
    r"(?:^┏.*\n(?P<head>(?:^┃.*\n)+)^┡.*\n(?P<rows>(?:^│.*\n)+)^└.*$|(?P<markdown>(?:^\| .*\n)+))",
    re.MULTILINE,
)
"""A table with its centred title, drawn with rich's lines or written in Markdown."""


def printed(results: Results, step: str, table: str = "") -> str:
    """A step's command and what it printed: all tables, or the one of this number, from 1.

    Raises:
        ValueError: If the step failed, was not run or printed no such table.
    """
    if results.steps.get(step, {}).get("status") != "ok":
        raise ValueError(f"{results.folder} has no results of the step {step}; run it, and see its .log if it failed")
    found = [_markdown(match) for match in TABLE.finditer((results.folder / f"{step}.txt").read_text())]
    wanted = found[int(table) - 1 :][:1] if table else found
    if not wanted:
        raise ValueError(f"{results.folder}/{step}.txt has {len(found)} tables, and none of number '{table}'")
    return "\n\n".join([f"    {in_shell(results.steps[step])}", *wanted])


printed_settings = printed_gpu = printed_long = printed


def _markdown(table: re.Match[str]) -> str:
    title = " ".join(line.strip() for line in table["title"].splitlines())
    if table["markdown"]:
        made = table["markdown"].rstrip()
    else:
        heads = [_cells(line, "┃") for line in table["head"].splitlines()]  # a header may have several lines
        rows = [_cells(line, "│") for line in table["rows"].splitlines()]
        if broken := [row for row in rows if not row[0]]:
            raise ValueError(f"the table was too wide, so that cells were broken: {broken[0]}")
        made = markdown([" ".join(filter(None, words)) for words in zip(*heads, strict=True)], rows)
    return f"{title}:\n\n{made}" if title else made


def _cells(line: str, between: str) -> list[str]:
    return [cell.strip() for cell in line.split(between)[1:-1]]
