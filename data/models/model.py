"""Loads a Mixture of Experts: the bundled Switch Transformer, a local folder, or a model of the Hugging Face hub."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from data.arguments import check_choice
from data.files import check_fetched, read_json
from data.models.family import check_family
from data.models.layout import SWITCH, MoELayout
from data.models.registered import moe_modules, registered_layout
from data.models.weights import ModelWeights, is_pickled, locate, model_file, weights_file

OLDEST_TRANSFORMERS = "5.18"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedModel:
    """A Mixture of Experts that is ready to run.

    Attributes:
        model: A Switch Transformer, or a decoder-only model with the experts interface of transformers, in evaluation
            mode.
        tokenizer: The model's tokenizer; None if the caller has none.
        layout: Identity and geometry of the MoE layers.
    """

    model: Any
    tokenizer: Any
    layout: MoELayout

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> "LoadedModel":
        """Wraps a live model, which is used as it is.

        Args:
            model: A model of transformers: `SwitchTransformersForConditionalGeneration`, or a decoder-only Mixture of
                Experts with its language model head, such as `Qwen3MoeForCausalLM`.
            tokenizer: The model's tokenizer, for callers that need one.

        Raises:
            TypeError: If the model is of another class.
            ValueError: If the model is in training mode, or Switchcast cannot run its family.
        """
        from transformers import GenerationMixin

        if not isinstance(model, GenerationMixin):
            raise TypeError(
                f"got a {type(model).__name__}, expected a SwitchTransformersForConditionalGeneration, or a "
                "decoder-only Mixture of Experts of transformers with its head, such as Qwen3MoeForCausalLM"
            )
        live: Any = model
        name = live.config.name_or_path or type(model).__name__
        check_family(name, live.config.to_dict())
        if live.training:
            raise ValueError("the model is in training mode, where routers add noise; call model.eval() first")
        _check_transformers()
        return cls(model, tokenizer, layout_of(model, name))

    def to(self, device: torch.device) -> None:
        """Moves what was loaded of the model to a device."""
        # `model.to` refuses a model without its experts, whose parameters are on the meta device
        self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    def check_ids(self, *ids: Tensor) -> None:
        """Refuses token ids that the model has no embedding for.

        Raises:
            ValueError: If there is one; the message compares tokenizer and embedding table.
        """
        rows = len(self.model.get_input_embeddings().weight)
        if (largest := max((int(each.max()) for each in ids if each.numel()), default=0)) >= rows:
            known = f", its tokenizer {len(self.tokenizer)} tokens" if self.tokenizer else ""
            raise ValueError(
                f"the text has the token {largest}, but {self.layout.model_id} has {rows} embeddings{known}; use the "
                "tokenizer that the model was trained with, or resize the embedding table (resize_token_embeddings)"
            )


def layout_of(model: Any, model_id: str, revision: str = "") -> MoELayout:
    """Reads the layout of a live model of any family that Switchcast takes.

    Raises:
        ValueError: If it has no experts, or its MoE layers do not fit together.
    """
    read = MoELayout.from_model if model.config.model_type == SWITCH else registered_layout
    return read(model, model_id, revision)


def _check_transformers() -> None:
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ValueError(
            f"transformers {transformers.__version__} records wrong router logits for Switch models, and its experts "
            f"interface differs; install transformers>={OLDEST_TRANSFORMERS}"
        )


def check_model(model: str, revision: str = "") -> str:
    """Refuses models that Switchcast cannot run before weights are read; returns the family.

    Raises:
        ValueError: If the model's family is refused, it has no experts, or the installed transformers is too old.
    """
    _check_transformers()
    config = read_json(model_file(model, revision, "config.json"))
    check_family(model, config)
    family: str = config["model_type"]
    if family != SWITCH:  # a Switch model's configuration tells its experts
        registered_layout(_outline(family, model, revision), model, revision)
    return family


def load_tokenizer(place: str, revision: str) -> Any:
    """Loads a model's tokenizer.

    Raises:
        ValueError: If a local folder has no tokenizer, where transformers would construct one without a vocabulary, or
            a file of it is a pointer of Git LFS; if a package that reads its vocabulary is missing.
    """
    from transformers import AutoTokenizer

    if Path(place).is_dir():
        found = [name for name in TOKENIZER_FILES if (Path(place) / name).exists()]
        if not found:
            raise ValueError(f"the folder has no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy the model's into it")
        for name in (*found, *(name for name in TOKENIZER_SETTINGS if (Path(place) / name).exists())):
            check_fetched(Path(place) / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main")
        tokenizer("text")  # settings of the wrong type are found only when they are used
        return tokenizer
    except Exception as error:  # transformers tries tiktoken last, and its words are about that
        if find_spec("sentencepiece") or not any(name in str(error) for name in ("sentencepiece", "tiktoken")):
            lacks = Path(place).is_dir() and not (Path(place) / TOKENIZER_SETTINGS[0]).exists()
            mend = f" without {TOKENIZER_SETTINGS[0]}; copy the model's into the folder" if lacks else ""
            raise ValueError(f"its tokenizer could not be loaded{mend} ({error})") from None
        raise ValueError(
            "its tokenizer is a SentencePiece vocabulary without tokenizer.json; `pip install sentencepiece`, or add "
            "the tokenizer.json that AutoTokenizer saves where it is installed"
        ) from None


def load_model(model: str, revision: str = "", dtype: Dtype = "float32") -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        model: the name of a bundled model, a local folder, or a hub id.
        revision: Revision of a hub model.
        dtype: Dtype of the weights; routers always compute in float32.

    Raises:
        ValueError: If Switchcast cannot run the model, or files are missing, damaged or incomplete.
    """
    return _load(model, revision, dtype, _class_of(check_model(model, revision), model, revision))


def _load(
    model: str, revision: str, dtype: Dtype, kind: Any, final: Any = None, absent: Mapping[str, nn.Module] | None = None
) -> LoadedModel:
    """Loads a model as one class and returns it as another, with the modules that were absent until then."""
    check_choice("dtype", dtype, get_args(Dtype))
    if pickled := is_pickled(weights_file(model, revision)):
        ModelWeights(model, revision)  # transformers' words for what the safe loader refuses advise to do without it
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else transformers asks the hub for a conversion
    with _errors_of(model):
        live, report = kind.from_pretrained(
            locate(model),
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            use_safetensors=not pickled,
            ignore_mismatched_sizes=True,  # they are refused by name below
            output_loading_info=True,
        )
        tokenizer = load_tokenizer(locate(model), revision)
    if wrong := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise ValueError(f"{model} lacks {len(wrong)} weights or has them in another shape, first {wrong[0]}")
    live.__class__ = final or kind
    if final is not None:  # its files stay in use, and may change: no weight stays mapped from them
        live._apply(lambda tensor: tensor.clone())
    for name, module in (absent or {}).items():
        live.set_submodule(name, module)
    return LoadedModel(live.eval(), tokenizer, layout_of(live, model, revision))


def load_dense(model: str, revision: str = "", dtype: Dtype = "float32") -> LoadedModel:
    """Loads a model without its experts, so that no process has to hold all of them.

    The experts modules of a Switch model stay empty; those of other families keep their parameters' names and shapes,
    on the meta device. Arguments and errors are those of `load_model`.
    """
    family = check_model(model, revision)
    kind, taken = _class_of(family, model, revision), {}

    class WithoutExperts(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for name in _experts_names(self, family):
                taken[name] = self.get_submodule(name)
                self.set_submodule(name, nn.Module())
                if family == SWITCH:  # else transformers would initialise experts that are not there
                    self.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True

    # transformers looks up by the class how files are laid out
    WithoutExperts.__name__, WithoutExperts.__module__ = kind.__name__, kind.__module__
    return _load(model, revision, dtype, WithoutExperts, kind, {} if family == SWITCH else taken)


def _experts_names(live: nn.Module, family: str) -> list[str]:
    """Module paths of a live model's experts."""
    if family == SWITCH:
        return [name for name, _ in live.named_modules() if name.endswith(".mlp.experts")]
    return [layer.name for layer in moe_modules(live)]


def _class_of(family: str, model: str, revision: str) -> Any:
    """The model class of transformers for a family."""
    from transformers import AutoConfig, AutoModelForCausalLM, SwitchTransformersForConditionalGeneration

    if family == SWITCH:
        return SwitchTransformersForConditionalGeneration
    with _errors_of(model):
        config: Any = AutoConfig.from_pretrained(locate(model), revision=revision or "main")
        return AutoModelForCausalLM._model_mapping[type(config)]


def outline(model: str, revision: str = "", quantised: bool = False) -> LoadedModel:
    """A model on the meta device: modules, shapes and layout without weights or tokenizer.

    Args:
        model: A folder or a hub id, of which config.json is read.
        revision: Revision of a hub model.
        quantised: Whether a model with quantised weights is taken, too: its layers are the same.

    Raises:
        ValueError: If Switchcast cannot run the model.
    """
    _check_transformers()
    config = read_json(model_file(model, revision, "config.json"))
    check_family(
        model, {key: value for key, value in config.items() if not (quantised and key == "quantization_config")}
    )
    live = _outline(config["model_type"], model, revision)
    return LoadedModel(live, None, layout_of(live, model, revision))


def _outline(family: str, model: str, revision: str) -> Any:
    """The model on the meta device: modules and shapes without weights."""
    from transformers import AutoConfig

    with _errors_of(model):
        config: Any = AutoConfig.from_pretrained(locate(model), revision=revision or "main")
        with torch.device("meta"):
            return _class_of(family, model, revision)(config)


@contextmanager
def _errors_of(model: str) -> Iterator[None]:
    """Turns what transformers raises on a damaged folder, which is of many kinds, into a ValueError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are refused by name
    try:
        yield
    except Exception as error:
        raise ValueError(f"{model} could not be loaded: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
