"""The docs: links and named files exist, named commands can be run, examples run, and no old name is left."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jsonargparse
import numpy as np
import pytest

import switchcast.__main__
import train
from docs import pictures

ROOT = Path(__file__).parents[1]
PACKAGES = "data|predictor|runtime|switchcast|benchmarks|stress|examples"
FOLDERS = [*PACKAGES.split("|"), "tests", "docs", "configs", ".github"]
TEXT = {".py", ".md", ".yaml", ".yml", ".cff", ".toml", ".svg"}
HISTORY = {"docs/log.md", "CHANGELOG.md", "tests/test_docs.py"}  # these may use old names

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    *PAGES,
    *sorted(path for path in ROOT.iterdir() if path.suffix in TEXT - {".md"}),
    *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in TEXT and path not in PAGES),
]

LINK = re.compile(r"\]\(([^()\s]+)\)|(?:href|src)=\"([^\"]+)\"")
COMMAND = re.compile(rf"-m ((?:{PACKAGES})(?:\.\w+)*)")
REPOSITORY_PATH = re.compile(rf"`((?:{PACKAGES}|tests|docs|configs)/[\w./-]*)`")
DOTTED_NAME = re.compile(rf"(?<!`)`((?:{PACKAGES})(?:\.\w+)+)`(?!`)")
BLOCK = re.compile(r"^```\n(.*?)^```|((?:^ {4}.*\n)+)", re.DOTALL | re.MULTILINE)
TAKES_OPTIONS = re.compile("from_command_line|parse_args")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Names of the first flat layout. ORDINARY are English words too: they count where they are imported, called or quoted.
OLD_WORDS = """
    SlotExperts SlotWeights CachedSlots SlottedModel SlotTransfer CacheTransfer Shelf Tally Foreseen LikeLast
    LikeNearest Peers BatchCost LiveExperts BatchFormer TrafficBatch LoadForecaster
    LearnedForecaster Replicator shelf tally foresight slotted wishes in_force held_up_ms wake_tokens
    ALIKE GROUPED PIPELINED LIKELY LATEST NEWS
"""
ORDINARY = "Flight Route Place Pool Guarded Expecting Checker Schedule Skew Traffic Budget"
OLD_MODULES = {
    "runtime": """
        balance batch cache cached calibration check choices controller deal disk fetch flight flow foresight
        homes loads memory peers plan planner policies products relax replay results rivals route scenarios
        schedule search shelf sinks slots slotted source split steps stopwatch summary tally tiers transfer
        verdict weightfile worker workloads
    """,
    "predictor": """
        attention calibrate export history ladder learned losses metrics model module plots recurrent report
        resume ridge samples scores segments sru tables token_table tracking
    """,
    "data": """
        card columns corpus corruption grouped layout phases ranks samples skew store switch tap trace tracer
        traffic weights
    """,
    "benchmarks": "injected machine make_switch recorded turns",
}


def any_of(words: str) -> str:
    return f"(?:{'|'.join(words.split())})"


OLD_NAMES = [
    re.compile(rf"\b({any_of(OLD_WORDS)})\b"),
    re.compile(rf"(?:class |import |`)({any_of(ORDINARY)})\b|\b({any_of(ORDINARY)})\("),
    *(
        re.compile(rf"(?:from |import |-m |[`\"'])({package}(?:\.{any_of(names)}\b|/{any_of(names)}\.py\b))")
        for package, names in OLD_MODULES.items()
    ),
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> Iterator[str]:
    for match in LINK.finditer(prose(text)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place = (path.parent / target) if target else path
        if not place.exists():
            yield f"{name(path)} links to {target}, which does not exist"
        elif anchor and place.suffix == ".md" and anchor not in anchors(place.read_text() if target else text):
            yield f"{name(path)} links to {target}#{anchor}, but no heading has that anchor"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or the name of something that the longest module in it mentions."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if length == len(parts) and (file.exists() or place.is_dir()):
            return True
        if file.exists():
            return re.search(rf"\b{parts[length]}\b", file.read_text()) is not None
    return False


def runs(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    try:
        spec = find_spec(module)
        return spec is not None and (
            spec.submodule_search_locations is None or find_spec(f"{module}.__main__") is not None
        )
    except ModuleNotFoundError:
        return False


def old_names(text: str) -> list[str]:
    return [match[match.lastindex or 0] for pattern in OLD_NAMES for match in pattern.finditer(text)]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every `make`, `python`, `switchcast` and `torchrun` command in the code blocks of a page.

    `...` stands for options of the command before.
    """
    for match in BLOCK.finditer(text):
        for line in (match[1] or match[2]).replace("\\\n", " ").splitlines():
            if command := re.match(r" *(?:[A-Z_]+=\S+ +)*((?:make|python|switchcast|torchrun) .*)", line):
                yield [word for word in shlex.split(command[1], comments=True) if word != "..."]


class ParsedError(Exception):
    """Nothing went wrong: a command line was parsed without an error."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Has a command's own parser read its words, and no more; returns what is wrong with them, or an empty text."""
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse_args(self, *args, original=parser.parse_args, **settings):
            original(self, *args, **settings)
            raise ParsedError

        monkeypatch.setattr(parser, "parse_args", parse_args)

    def call(words: list[str]) -> str:
        program, *options = words[words.index("-m") + 1 :] if "-m" in words else words[words[0] == "python" :]
        place = ROOT / program.replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        monkeypatch.setattr(sys, "argv", [program, *options])
        try:
            if program == "make":
                return (
                    "" if re.search(rf"^{options[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else "no target"
                )
            if program == "train.py":
                train.command_line()
            elif program == "switchcast":
                switchcast.__main__.main()
            elif program.startswith("examples/"):
                return "" if (ROOT / program).exists() else "no such file"
            elif TAKES_OPTIONS.search(file.read_text()):
                runpy.run_module(program, run_name="__main__")
            else:
                return f"{program} takes no options, such as {options}" if options else ""
        except ParsedError:
            return ""
        except SystemExit as ended:
            return f"exit code {ended.code}: {capsys.readouterr().err}" if ended.code else ""
        except ValueError as error:
            return str(error)
        return "nothing was parsed"

    return call


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", [path for path in PAGES if name(path) not in HISTORY], ids=name)
def test_commands_parse(page, parse):
    commands = list(command_lines(page.read_text()))
    assert commands or page.parent.name != "how-to"
    wrong = {" ".join(words): parse(words) for words in commands}
    assert {command: said for command, said in wrong.items() if said} == {}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_wrong_commands_are_found(parse):
    page = """
    make tea
    FAST=1 python -m runtime.infer --predictor x \\
        --batchs 4   # misspelt

```
python train.py --model.depth 3
switchcast export a.npz --to nowhere
torchrun --nproc-per-node 2 -m runtime.infer --devices two
python -m benchmarks.replica_rows --fast
python -m data.show outputs/traces/mine
```
    """
    said = [parse(words) for words in command_lines(page)]
    assert [bool(text) for text in said] == [True] * 6 + [False]
    assert "--batchs" in said[1]


def test_links_resolve():
    assert [said for path in PAGES for said in broken_links(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("pattern", "exists"),
    [(COMMAND, runs), (REPOSITORY_PATH, lambda place: (ROOT / place).exists()), (DOTTED_NAME, resolves)],
    ids=["commands", "files", "modules"],
)
def test_what_is_named_exists(pattern, exists):
    named = [
        (name(path), found)
        for path in FILES
        if name(path) not in HISTORY
        for found in pattern.findall(path.read_text())
    ]
    assert [f"{path} names {found}" for path, found in named if not exists(found)] == []


def test_no_old_name_is_left():
    found = {name(path): old_names(path.read_text()) for path in FILES if name(path) not in HISTORY}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_architecture_page_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text()
    modules = [
        name(path)
        for package in ("data", "predictor", "runtime")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert [module for module in modules if f"](../{module}) |" not in text] == []


@pytest.mark.parametrize("number", range(len(PYTHON.findall((ROOT / "CONTRIBUTING.md").read_text()))))
def test_examples_of_contributing_run(number):
    exec(compile(PYTHON.findall((ROOT / "CONTRIBUTING.md").read_text())[number], "CONTRIBUTING.md", "exec"), {})


def test_the_dispatch_example_prints_what_the_page_says(capsys):
    section = (ROOT / "docs/runtime.md").read_text().split("## How dispatch works")[1].split("\n## ")[0]
    exec(PYTHON.findall(section)[0], {})
    assert f"```\n{capsys.readouterr().out}```" in section


def test_the_picture_of_splits_shows_what_the_page_says(tmp_path):
    with np.load(pictures.LOADS) as recorded:
        loads = recorded["counts"]
    none, eplb, ours = (tokens.sum(0).max() for tokens in pictures.splits(loads).values())
    page = " ".join((ROOT / "docs/concepts.md").read_text().split())
    assert f"{none} on the slowest without replicas, {eplb} with EPLB's replicas and an even split, {ours} with" in page
    pictures.draw(loads, tmp_path / "split.png")
    assert (tmp_path / "split.png").stat().st_size > 10_000


def test_what_is_wrong_is_found():
    """Each check, fed with a page that it must refuse."""
    page = ROOT / "docs/made_up.md"
    said = list(broken_links(page, "[a](none.md) [b](glossary.md#no-such-term) [c](glossary.md#terms) [d](https://x)"))
    assert len(said) == 2
    assert not runs("runtime.no_such_module")
    assert not runs("runtime.balancing")  # a package without __main__
    assert runs("runtime.simulate")
    assert not resolves("runtime.balancing.plan.NoSuchName")
    assert resolves("runtime.balancing.plan.ReplicationPlan")
    found = old_names("import runtime.plan\nx = SlotExperts(Budget(3)), `runtime/tiers.py`, `data.trace`")
    assert set(found) == {"runtime.plan", "SlotExperts", "Budget", "runtime/tiers.py", "data.trace"}
    assert (
        old_names("`runtime.engine` --data.trace `runtime/offload/tier.py` `data.traces.trace` data.layout Budget")
        == []
    )
