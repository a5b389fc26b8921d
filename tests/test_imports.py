"""The house: imports run one way, and the runtime stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "wandb", "datasets", "sklearn")
LIGHT_MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "runtime").rglob("*.py"))
]


def loaded_by(statements: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after some statements."""
    script = f"import sys\n{statements}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(ast.literal_eval(done.stdout.strip().splitlines()[-1]))


def test_importing_the_runtime_loads_nothing_heavy():
    assert loaded_by("\n".join(f"import {name}" for name in LIGHT_MODULES)) == set()


@pytest.mark.parametrize("name", HEAVY)
def test_the_check_above_can_fail(name):
    assert name in loaded_by(f"import runtime\nimport {name}")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("data", {"predictor", "runtime", "train"}), ("predictor", {"runtime", "train"}), ("runtime", {"train"})],
)
def test_arrows_run_one_way(package, forbidden):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, f"{path.name} imports {names}"
