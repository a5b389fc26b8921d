"""Loads a Switch Transformer: the bundled small one, a local folder, or a model of the Hugging Face hub."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.files import read_json
from data.models.layout import MoELayout
from data.models.weights import ModelWeights, locate, model_file

OLDEST_TRANSFORMERS = "5.18"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedSwitch:
    """A Switch Transformer that is ready to run.

    Attributes:
        model: `SwitchTransformersForConditionalGeneration` in evaluation mode.
        tokenizer: The model's tokenizer; None if the caller has none.
        layout: Identity and geometry of the MoE layers.
    """

    model: Any
    tokenizer: Any
    layout: MoELayout

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> "LoadedSwitch":
        """Wraps a live model, which is used as it is.

        Args:
            model: A `SwitchTransformersForConditionalGeneration` of transformers.
            tokenizer: The model's tokenizer, for callers that need one.

        Raises:
            TypeError: If the model is of another class.
            ValueError: If the model is in training mode.
        """
        from transformers import SwitchTransformersForConditionalGeneration

        if not isinstance(model, SwitchTransformersForConditionalGeneration):
            raise TypeError(f"got a {type(model).__name__}, expected a SwitchTransformersForConditionalGeneration")
        if model.training:
            raise ValueError("the model is in training mode, where routers add noise; call model.eval() first")
        _check_transformers()
        name = model.config.name_or_path or type(model).__name__
        return cls(model, tokenizer, MoELayout.from_model(model, name))


def _check_transformers() -> None:
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ValueError(
            f"transformers {transformers.__version__} records wrong router logits for Switch models; "
            f"install transformers>={OLDEST_TRANSFORMERS}"
        )


def check_is_switch(model: str, revision: str = "") -> None:
    """Refuses other model types before weights are read.

    Raises:
        ValueError: If the model is not a Switch Transformer or the installed transformers is too old.
    """
    _check_transformers()
    kind = read_json(model_file(model, revision, "config.json")).get("model_type")
    if kind != "switch_transformers":
        raise ValueError(f"{model} is a {kind} model; expected switch_transformers (such as google/switch-base-8)")


def load_tokenizer(place: str, revision: str) -> Any:
    """Loads a model's tokenizer.

    Raises:
        ValueError: If a local folder has no tokenizer; transformers would construct one without a vocabulary.
    """
    from transformers import AutoTokenizer

    if Path(place).is_dir() and not any((Path(place) / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(f"the folder has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy the model's into it")
    return AutoTokenizer.from_pretrained(place, revision=revision or "main")


def load_switch(model: str, revision: str = "", dtype: Dtype = "float32") -> LoadedSwitch:
    """Loads a model and its tokenizer.

    Args:
        model: `BUNDLED`, a local folder, or a hub id.
        revision: Revision of a hub model.
        dtype: Dtype of the weights; routers always compute in float32.

    Raises:
        ValueError: If the model is not a Switch Transformer, or files are missing, damaged or incomplete.
    """
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.utils import logging

    check_is_switch(model, revision)
    place: Any = locate(model)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are refused by name below
    try:
        switch, report = SwitchTransformersForConditionalGeneration.from_pretrained(
            place,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer: Any = load_tokenizer(place, revision)
    except Exception as error:  # transformers raises many kinds on a damaged folder
        raise ValueError(f"{model} could not be loaded: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    if wrong := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise ValueError(f"{model} lacks {len(wrong)} weights or has them in another shape, first {wrong[0]}")
    layout = MoELayout.from_model(switch, model, revision)
    return LoadedSwitch(switch.eval(), tokenizer, layout)


def load_dense(model: str, revision: str = "", dtype: Dtype = "float32") -> LoadedSwitch:
    """Loads a model without its experts: their modules stay empty, so no process has to hold all experts.

    Arguments and errors are those of `load_switch`.
    """
    from transformers import AutoConfig, GenerationConfig, SwitchTransformersForConditionalGeneration

    check_is_switch(model, revision)
    weights, place = ModelWeights(model, revision), locate(model)
    try:
        config: Any = AutoConfig.from_pretrained(place, revision=revision or "main")
        tokenizer: Any = load_tokenizer(place, revision)
        with torch.device("meta"):
            switch: Any = SwitchTransformersForConditionalGeneration(config)
    except Exception as error:  # transformers raises many kinds on a damaged folder
        raise ValueError(f"{model} could not be loaded: {error}") from None
    for name in [name for name, _ in switch.named_modules() if name.endswith(".mlp.experts")]:
        switch.set_submodule(name, nn.Module())
    kind, names = getattr(torch, dtype), [name for name in switch.state_dict() if name in weights.files]
    found = {name: weights.read(name).to(kind, copy=True) for name in names}  # copied, because files may change
    try:
        switch.load_state_dict(found, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{model} could not be loaded: {error}") from None
    switch.tie_weights()
    if missing := [name for name, value in switch.state_dict().items() if value.is_meta]:
        raise ValueError(f"{model} lacks {len(missing)} weights, first {missing[0]}")
    with suppress(OSError):  # without the file, generation uses the model's configuration
        switch.generation_config = GenerationConfig.from_pretrained(place, revision=revision or "main")
    return LoadedSwitch(switch.eval(), tokenizer, MoELayout.from_model(switch, model, revision))


def read_embedding(model: str, revision: str = "") -> Tensor:
    """Reads the token embedding table `[V, D]` in float32 without loading the rest of the model.

    Raises:
        ValueError: If the model has no safetensors weights or they are damaged.
    """
    return ModelWeights(model, revision).read("shared.weight").float()
