"""Figures that README and docs show, generated from a folder of results.

    python -m benchmarks.published docs/results/intel-xeon-processor-2026-11-27

writes blocks of the Markdown files between `<!-- figures: NAME, FOLDER -->` and `<!-- end of figures -->` anew: from a
folder of `make gpu` those whose names end in `_gpu`, of `make bench-long` and `make bench-settings` those in `_long`
and `_settings`, of `make bench` the others.
`NAME STEP` or `NAME STEP NUMBER` names what a step printed, or one table of it. A test compares the blocks with the
folders that they name.
"""

import re
from collections.abc import Callable
from inspect import getmembers, isfunction
from pathlib import Path

from benchmarks.support import bench_tables, long_tables, paper_tables, printed, simulator_tables
from benchmarks.support.results import BENCH, GPU, LONG, SETTINGS, Results
from data.cli import OneLineParser, user_errors
from data.files import write_text

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "docs/results/README.md", "docs/gpu.md", "docs/runtime.md", "docs/tiers.md", "docs/simulator.md",
    "docs/worth-it.md",
)  # fmt: skip
BLOCK = re.compile(r"<!-- figures: ([^,]+), (\S+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)
ENDINGS = {GPU: "_gpu", LONG: "_long", SETTINGS: "_settings"}
"""Ends of the names of blocks, by the command that writes their folder; those of `make bench` have none."""

BLOCKS: dict[str, Callable[..., str]] = {
    name: made
    for tables in (bench_tables, long_tables, paper_tables, printed, simulator_tables)
    for name, made in getmembers(tables, isfunction)
    if made.__module__ == tables.__name__ and not name.startswith("_")
}
"""What makes each block: the public functions of these modules."""


def written_by(name: str) -> str:
    """The command that writes a block's folder; the name may have words behind it."""
    block = name.split()[0]
    return next((command for command, ending in ENDINGS.items() if block.endswith(ending)), BENCH)


def generated(text: str, folder: Path | None = None) -> str:
    """A page with its blocks made anew.

    Args:
        text: The page.
        folder: Folder of results, for the blocks of the command that wrote it; by default each block's own.

    Raises:
        ValueError: If a block has no such name, or its folder not the step that it needs.
    """

    def block(found: re.Match[str]) -> str:
        (name, *words), own = found[1].split(), Path(found[2])
        if name not in BLOCKS:
            raise ValueError(f"no block of figures is called '{name}'; expected one of {', '.join(BLOCKS)}")
        if folder is not None and written_by(name) == Results(folder).command:
            own = folder
        try:
            made = BLOCKS[name](Results(own), *words)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{own} does not hold the figures of '{found[1]}' ({error!r}); run {Results(own).command} again"
            ) from None
        return f"<!-- figures: {found[1]}, {own} -->\n{made}\n<!-- end of figures -->"

    return BLOCK.sub(block, text)


def main() -> None:
    """Command line."""
    parser = OneLineParser(prog="python -m benchmarks.published", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of results in docs/results")
    with user_errors():
        given = parser.parse_args().folder.resolve()
        if not given.is_relative_to(ROOT / "docs/results"):
            raise ValueError(f"{given} is not in docs/results, where pages can link to it; copy it there")
        given = given.relative_to(ROOT)
        made = {page: generated((ROOT / page).read_text(), given) for page in PAGES}
        for page, text in made.items():
            write_text(ROOT / page, text)
    print(f"{sum(len(BLOCK.findall(text)) for text in made.values())} blocks in {', '.join(PAGES)}")


if __name__ == "__main__":
    main()
