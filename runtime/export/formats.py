"""All formats of plans by name, and `read_engine_plan`, which recognises the format of a file by its content."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from data.cli import load_yaml
from data.errors import first_line, shown
from runtime.balancing.plan import EMPTY
from runtime.balancing.plan_file import SavedPlan, check_size, is_plan, plan_from, plan_text, read_document, read_text
from runtime.export.engine_plan import Consequences, EngineFormat, EnginePlan
from runtime.export.sglang import KEY, SGLangFormat, check_other_keys
from runtime.export.tensorrt_llm import TensorRTLLMFormat
from runtime.export.vllm import VllmFormat
from runtime.export.vllm_ascend import VllmAscendFormat


class OwnFormat:
    """Our own plan file, which keeps homes and empty slots."""

    name, suffix, counts_dense = "switchcast", ".json", False
    consequences: ClassVar[Consequences] = {
        "twice": "the second copy takes memory and balances nothing; export fills its slot anew",
    }

    def text(self, saved: SavedPlan) -> str:
        """See runtime/balancing/plan_file.py."""
        return plan_text(saved)

    def flags(self, saved: SavedPlan, path: Path) -> list[str]:
        """How to go on from it."""
        return [f"switchcast export {path} --to sglang|vllm|tensorrt-llm|vllm-ascend"]

    def read(self, document: Any) -> EnginePlan | None:
        """The maps; a plan file that is no valid plan is refused."""
        if not is_plan(document):
            return None
        saved = plan_from(document, "it")
        numbers = saved.layers.numbers or range(len(saved.plan.phy2log))
        rows = dict(zip(numbers, saved.plan.phy2log.tolist(), strict=True))
        notes = ["empty slots are filled when it is exported"] if (saved.plan.phy2log == EMPTY).any() else []
        return EnginePlan(self.name, rows, saved.plan.num_devices, saved.plan.phy2log.shape[1], notes=notes)


MOST_YAML = 1 << 20
"""Largest YAML that is read: its loader takes ten seconds for as much; 61 layers of 288 slots take 0.1 MB."""
FORMATS: dict[str, EngineFormat] = {
    each.name: each for each in (SGLangFormat(), VllmFormat(), TensorRTLLMFormat(), VllmAscendFormat(), OwnFormat())
}
"""All formats by name."""


def read_engine_plan(path: Path) -> EnginePlan:
    """Reads a plan of any engine, or our own.

    Raises:
        ValueError: If the file is missing, damaged, or of none of the formats.
    """
    document = _document(path)
    try:
        for each in FORMATS.values():
            if (found := each.read(document)) is not None:
                return found
        check_other_keys(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind = f"the keys {sorted(map(str, document))[:8]}" if isinstance(document, dict) else shown(document)
    raise ValueError(f"{path} holds {kind}, expected a plan of {', '.join(FORMATS)}")


def _document(path: Path) -> Any:
    if path.suffix == ".pt":
        return _pickled(path)
    if path.suffix not in (".yaml", ".yml"):
        return read_document(path)
    text = read_text(path, MOST_YAML)
    try:
        return load_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from None


def _pickled(path: Path) -> Any:
    """SGLang's .pt, by torch's safe loader; its map as lists."""
    import torch

    from data.traces.sglang import stored_array

    check_size(path)
    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, pickle and zip each raise their own on a damaged file
        raise ValueError(f"{path} cannot be read as a map of SGLang: {first_line(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get(KEY), torch.Tensor):
        return document
    try:
        return document | {KEY: stored_array(document[KEY]).tolist()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
