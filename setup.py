"""Builds the wheel: there, `data`, `predictor`, `runtime` and `train` live inside the package `switchcast`.

In a checkout they are top-level packages. Installed, such names would collide with a project that has a `data` package
of its own, so a wheel holds them as `switchcast.data` and so on, with their imports rewritten; three stubs keep the
short names (`python -m runtime.infer`) working where nothing else has them.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = ("data", "predictor", "runtime")
NAMES = "|".join((*PACKAGES, "train"))
STUB = '''"""The package `switchcast.{name}` under its short name."""

from switchcast import {name} as _package

__all__, __path__, __getattr__ = _package.__all__, _package.__path__, _package.__getattr__
'''


class BuildNested(build_py):
    """Moves the packages into `switchcast`; an editable install keeps the checkout's layout."""

    def run(self) -> None:
        """Builds as usual, then moves and rewrites."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build moved must not come twice
        super().run()
        if self.editable_mode:
            return
        library = Path(self.build_lib)
        nest = library / "switchcast"
        for name in (*PACKAGES, "train.py"):
            shutil.move(library / name, nest / name)
        shutil.copytree("configs", nest / "configs")
        for path in nest.rglob("*.py"):
            path.write_text(nested(path.read_text()))
        for name in PACKAGES:
            (library / name).mkdir()
            (library / name / "__init__.py").write_text(STUB.format(name=name))


def nested(source: str) -> str:
    """Source code with its imports of these packages rewritten to those inside `switchcast`."""
    source = re.sub(rf"^(\s*)from ({NAMES})\b(?=[. ])", r"\1from switchcast.\2", source, flags=re.M)
    return re.sub(rf"^(\s*)import ({NAMES})$", r"\1from switchcast import \2", source, flags=re.M)


setup(cmdclass={"build_py": BuildNested})
