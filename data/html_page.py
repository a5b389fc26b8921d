"""A page in one HTML file: a finding, pictures and tables; no script, no font and nothing from elsewhere.

Light or dark as the reader's system is, from the width of a phone on: pictures and tables scroll in boxes of their own.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from data.files import whole_file

CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#57606a;--line:#d0d7de;--ours:#1f6feb}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--soft:#9198a1;--line:#30363d;--ours:#58a6ff}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.5rem 0}h2{margin:2.5rem 0 .5rem;font-size:1.25rem}h3{margin:1.8rem 0 .5rem;font-size:1rem}
.finding{font-size:1.2rem;border-left:4px solid var(--ours);padding-left:.8rem;margin:1rem 0 1.5rem}
figure{margin:1.2rem 0;background:#fff;border:1px solid var(--line);border-radius:8px;padding:.5rem;overflow-x:auto}
img{display:block;width:100%;min-width:40rem;height:auto}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line);overflow-wrap:normal}
thead th{border-top:0;color:var(--soft);font-weight:600;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
small{display:block;font-weight:400;color:var(--soft)}.ours td{color:var(--ours);font-weight:600}
"""


def picture(path: Path, alt: str) -> str:
    """A PNG, held by the page.

    Args:
        path: The file.
        alt: What it shows, for a reader who does not see it.
    """
    data = path.read_bytes()
    width, height = (int.from_bytes(data[start : start + 4]) for start in (16, 20))  # the first chunk of every PNG
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{html.escape(alt)}" width="{width}" height="{height}" src="{source}"></figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | float | None]], ours: str = "") -> str:
    """A table in a box of its own that scrolls.

    Args:
        header: Names of the columns.
        rows: Text, which may end in an interval in brackets; numbers, shown with three digits; None for nothing.
        ours: Rows that begin with it, or have it in the second place, stand out.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr{' class=ours' if ours and ours in row[:2] else ''}>" + "".join(map(_cell, row)) + "</tr>" for row in rows
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | float | None) -> str:
    if not isinstance(value, str):
        return "<td></td>" if value is None else f"<td>{value:.3f}</td>"
    number, bracket, interval = value.partition(" [")
    return f"<td>{html.escape(number)}" + (f" <small>[{interval}</small>" if bracket else "") + "</td>"


def write_page(path: Path, title: str, finding: str, parts: Sequence[str]) -> None:
    """Writes a page, whole or not at all.

    Args:
        path: The HTML file.
        title: Its title.
        finding: The result in a sentence.
        parts: HTML of what follows.
    """
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{CSS}</style>",
        f'<main><h1>{html.escape(title)}</h1><p class="finding">{html.escape(finding)}</p>',
        *parts,
        "</main></html>",
    ]
    with whole_file(path) as aside:
        aside.write_text("\n".join(page) + "\n", encoding="utf-8")
