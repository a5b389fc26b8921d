"""The docs: links and named files exist, named commands can be run, examples run, and no old name is left."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

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
