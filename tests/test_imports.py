"""The house: imports run one way, and the packages that others import stay light.

The arrows between runtime's rooms are read from the table in docs/architecture.md, so page and code cannot drift apart.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "wandb", "datasets", "sklearn")
PACKAGES = {  # what each may import, besides itself and libraries
    "data": set(),
    "predictor": {"data"},
    "runtime": {"data", "predictor"},
    "switchcast": {"data", "predictor", "runtime", "train"},
    "train": {"data", "predictor", "runtime"},
    "benchmarks": {"data", "predictor", "runtime"},
    "stress": {"data", "predictor", "runtime", "train", "benchmarks", "tests"},
}
OURS = {*PACKAGES, "tests", "examples"}
LIGHT = ["data", "predictor", "runtime", "runtime.balancing", "predictor.forecast"]  # and all of runtime.balancing.*
Arrow = tuple[str, str, str]  # importing module, imported module, where (file and line)


def module_name(path: Path) -> str:
    """runtime/balancing/plan.py -> runtime.balancing.plan; runtime/balancing/__init__.py -> runtime.balancing."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, source: str) -> Iterator[Arrow]:
    """Every import of a file: at the top, inside functions, for type checkers, relative, and import_module("...").

    `from a import b` is yielded as a.b, because b may be a module.
    """
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names = [resolve_name(str(node.args[0].value), package)]
        yield from ((module, name, f"{path}:{node.lineno}") for name in names)


def ours() -> list[Arrow]:
    """Every import of the packages, train.py and the benchmarks."""
    files = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))] + [ROOT / "train.py"]
    return [arrow for path in files for arrow in imported(path.relative_to(ROOT), path.read_text())]


def room(module: str) -> str:
    """runtime.balancing.plan -> balancing; the package itself, or a name that it exports, is `runtime`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / "runtime" / parts[1]).is_dir() else "runtime"


def allowed() -> dict[str, set[str]]:
    """The table "Arrows between the rooms of runtime" of docs/architecture.md: room -> rooms that it may import."""
    section = (ROOT / "docs/architecture.md").read_text().split("## Arrows between the rooms of runtime")[1]
    table = section.split("\n## ")[0].strip().splitlines()
    rows = [line.strip("|").split("|") for line in table if line.startswith("| `")]
    return {row[0].strip(" `"): {name.strip(" `") for name in row[1].split(",") if "`" in name} for row in rows}


def between_packages(arrows: Iterable[Arrow]) -> list[str]:
    """Imports from one package to another one that it may not import."""
    ends = [(module.split(".")[0], name.split(".")[0], where) for module, name, where in arrows]
    return [
        f"{where}: {source} must not import {target}"
        for source, target, where in ends
        if target in OURS and target != source and target not in PACKAGES[source]
    ]


def between_rooms(arrows: Iterable[Arrow], table: dict[str, set[str]]) -> list[str]:
    """Imports from one room of runtime to another one that the table does not allow."""
    ends = [
        (room(module), room(name), where)
        for module, name, where in arrows
        if module.split(".")[0] == name.split(".")[0] == "runtime"
    ]
    return [
        f"{where}: {source} must not import {target}"
        for source, target, where in ends
        if source != target and target not in table.get(source, set())
    ]


def cycle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Nodes of one import cycle, or none."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        graph.setdefault(source, set())
        if source != target:
            graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def loaded_by(statements: str, names: Iterable[str], path: Path = ROOT) -> set[str]:
    """Which of some packages a fresh interpreter has loaded after the statements; `path` is searched first."""
    script = f"import sys\n{statements}\nprint([name for name in {tuple(names)} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.strip().splitlines()[-1]))


def modules_of(folder: str) -> list[str]:
    return [module_name(path.relative_to(ROOT)) for path in sorted((ROOT / folder).rglob("*.py"))]


def test_packages_import_one_way():
    assert between_packages(ours()) == []


def test_rooms_of_runtime_import_along_the_table():
    assert between_rooms(ours(), allowed()) == []


def test_the_table_names_every_room_and_has_no_arrow_that_nothing_uses():
    table = allowed()
    rooms = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert set(table) == rooms | {"runtime"}
    pairs = {(room(a), room(b)) for a, b, _ in ours() if a.split(".")[0] == b.split(".")[0] == "runtime"}
    unused = {(a, b) for a in rooms for b in table[a]} - pairs
    assert unused == set()


def test_no_cycle_between_rooms():
    """A room is a folder of a package, or a file that lies in the package itself; `__init__` files only re-export."""

    def two(module: str) -> str:
        return ".".join(module.split(".")[:2])

    packages = set(PACKAGES)
    edges = [(two(a), two(b)) for a, b, _ in ours() if a not in packages and b.split(".")[0] in packages]
    assert cycle(edges) == []
    assert cycle((a, b) for a, targets in allowed().items() for b in targets) == []


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("data/made_up.py", "import predictor", "data must not import predictor"),
        ("data/text/made_up.py", "def f():\n    from runtime.engine import Engine", "data must not import runtime"),
        ("predictor/training/made_up.py", "import runtime.balancing.split", "predictor must not import runtime"),
        ("runtime/engine/made_up.py", "import train", "runtime must not import train"),
        ("runtime/engine/made_up.py", "from benchmarks.support import turns", "runtime must not import benchmarks"),
        ("runtime/engine/made_up.py", "from tests.helpers import batches", "runtime must not import tests"),
        ("benchmarks/made_up.py", "from switchcast import Engine", "benchmarks must not import switchcast"),
    ],
)
def test_a_forbidden_import_between_packages_is_found(path, source, said):
    (found,) = between_packages(imported(Path(path), source))
    assert found.startswith(path)
    assert found.endswith(said)


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("runtime/balancing/made_up.py", "import runtime.engine.engine", "balancing must not import engine"),
        ("runtime/experts/made_up.py", "from runtime.offload.cache import X", "experts must not import offload"),
        ("runtime/experts/made_up.py", "from runtime import offload", "experts must not import offload"),
        ("runtime/distributed/made_up.py", "from ..experts import X", "distributed must not import experts"),
        ("runtime/simulate/made_up.py", "def f():\n    import runtime.engine.batch", "simulate must not import engine"),
        ("runtime/balancing/__init__.py", "from ..infer import verify", "balancing must not import infer"),
        ("runtime/engine/made_up.py", "from importlib import import_module\nimport_module('runtime.infer')", "infer"),
        ("runtime/engine/made_up.py", "from runtime import Engine", "engine must not import runtime"),
        (
            "runtime/offload/made_up.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from runtime.telemetry.recorder import Telemetry",
            "offload must not import telemetry",
        ),
    ],
)
def test_a_forbidden_import_between_rooms_is_found(path, source, said):
    (found,) = between_rooms(imported(Path(path), source), allowed())
    assert found.endswith(said)


def test_an_allowed_import_is_not_reported():
    arrows = list(imported(Path("runtime/engine/made_up.py"), "import numpy\nfrom runtime.experts.layer import X"))
    assert between_packages(arrows) == between_rooms(arrows, allowed()) == []


def test_a_cycle_is_found():
    assert set(cycle([("a", "b"), ("b", "c"), ("c", "a"), ("d", "d")])) == {"a", "b", "c"}


def test_importing_all_of_runtime_loads_nothing_heavy():
    assert loaded_by("\n".join(f"import {name}" for name in modules_of("runtime")), HEAVY) == set()


def test_planning_and_the_package_doors_load_no_torch():
    names = [*LIGHT, *modules_of("runtime/balancing")]
    assert loaded_by("\n".join(f"import {name}" for name in names), ["torch", "transformers"]) == set()


@pytest.mark.parametrize("name", [*HEAVY, "torch"])
def test_a_heavy_import_is_found(name, tmp_path):
    """Stand-ins without content: importing the real packages takes half a minute."""
    (tmp_path / f"{name}.py").touch()
    assert loaded_by(f"import runtime\nimport {name}", [*HEAVY, "torch"], path=tmp_path) == {name}
