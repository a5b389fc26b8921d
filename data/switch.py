"""Where a Switch Transformer comes from: the bundled small one, a local folder, or the Hugging Face hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.layout import MoELayout

BUNDLED = "switch-mini-64"
"""Name of the model that comes with this package; see data/bundled/switch-mini-64/README.md."""
OLDEST_TRANSFORMERS = "5.18"
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedSwitch:
    """A Switch model ready to run.

    Attributes:
        model: `SwitchTransformersForConditionalGeneration` in evaluation mode.
        tokenizer: Its tokenizer.
        layout: Geometry and identity of its MoE layers.
    """

    model: Any
    tokenizer: Any
    layout: MoELayout


def locate(model: str) -> str:
    """The folder of the bundled model or a local folder as a path; anything else is taken for a hub id.

    Raises:
        ValueError: If `model` looks like a path and no folder is there.
    """
    if model == BUNDLED:
        return str(Path(__file__).parent / "bundled" / BUNDLED)
    if Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"{model} is not a folder; expected '{BUNDLED}', a local model folder, or a hub id 'owner/name'"
        )
    return model


def _file(model: str, revision: str, name: str) -> Path:
    """A file of the model, downloaded if it is on the hub."""
    place = locate(model)
    path = Path(place) / name if Path(place).is_dir() else None
    try:
        path = path or Path(hf_hub_download(place, name, revision=revision or None))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model} is no local folder and could not be had from the hub ({reason})") from None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {model} is no model folder with {name}")
    return path


def check_is_switch(model: str, revision: str = "") -> None:
    """Refuses anything that is not a Switch Transformer before weights are read.

    Raises:
        ValueError: Naming the model's type, or the version of transformers that is too old.
    """
    import transformers

    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ValueError(
            f"transformers {transformers.__version__} records wrong router logits for Switch models; "
            f"install transformers>={OLDEST_TRANSFORMERS}"
        )
    try:
        kind = json.loads(_file(model, revision, "config.json").read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json of {model} is not JSON ({error})") from None
    if kind != "switch_transformers":
        raise ValueError(f"{model} is a {kind} model; expected switch_transformers (such as google/switch-base-8)")


def load_switch(model: str, revision: str = "", dtype: Dtype = "float32") -> LoadedSwitch:
    """Loads a model and its tokenizer.

    Args:
        model: `BUNDLED`, a local folder, or a hub id.
        revision: Revision of a hub model.
        dtype: What the weights are cast to; routers compute in float32 in any case.

    Raises:
        ValueError: If it is not a Switch model, or files are missing, damaged or incomplete.
    """
    from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration
    from transformers.utils import logging

    check_is_switch(model, revision)
    place: Any = locate(model)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are refused below, by name
    try:
        switch, report = SwitchTransformersForConditionalGeneration.from_pretrained(
            place,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=revision or "main")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{model} could not be loaded: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    if wrong := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise ValueError(f"{model} lacks {len(wrong)} weights or has them in another shape, first {wrong[0]}")
    layout = MoELayout.from_model(switch, model, revision)
    return LoadedSwitch(switch.eval(), tokenizer, layout)


def read_embedding(model: str, revision: str = "") -> Tensor:
    """The model's token embedding table `[V, D]` in float32, without loading the rest of the model.

    Raises:
        ValueError: If the model has no safetensors weights or they are damaged.
    """
    name = "shared.weight"
    try:
        try:
            index = json.loads(_file(model, revision, "model.safetensors.index.json").read_text())
            shard = index["weight_map"][name]
        except (FileNotFoundError, ValueError):
            shard = "model.safetensors"
        with safe_open(_file(model, revision, shard), framework="pt") as weights:
            table: Tensor = weights.get_tensor(name)
    except (SafetensorError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"the embedding table of {model} cannot be read: {error}") from None
    return table.float()
