"""ModelWeights: reads single tensors of a model's safetensors files, bundled, local or on the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import read_json

BUNDLED = "switch-mini-64"
"""Name of the model that commands run unless told otherwise."""
BUNDLED_MODELS = (BUNDLED, "qwen3-mini-64")
"""Names of the models that this package contains; see their README.md in data/bundled."""
EMBEDDINGS = (
    "shared.weight",
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "backbone.embeddings.weight",
    "model.embeddings.weight",
    "model.word_embeddings.weight",
    "transformer.wte.weight",
)
"""Names of the token embedding table in files: of Switch, of most decoder-only families, and of some alone."""


def locate(model: str) -> str:
    """Returns the folder of a bundled or a local model; a hub id is returned as it is.

    Raises:
        ValueError: If `model` is neither a folder nor a hub id.
    """
    if model in BUNDLED_MODELS:
        return str(Path(__file__).parents[1] / "bundled" / model)
    if model and Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"{model} is not a folder; expected {' or '.join(map(repr, BUNDLED_MODELS))}, a local model folder, or a "
            "hub id 'owner/name'"
        )
    return model


def model_file(model: str, revision: str, name: str) -> Path:
    """Path of a file of the model; a hub model's file is downloaded.

    Raises:
        FileNotFoundError: If the model's folder has no such file.
        ValueError: If the file cannot be downloaded.
    """
    place = locate(model)
    if not Path(place).is_dir():
        return _download(place, name, revision)
    path = Path(place) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a model folder with {name}")
    return path


def _download(model: str, name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download  # only here: local folders do not need it

    try:
        return Path(hf_hub_download(model, name, revision=revision or None))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{model} is not a local folder and {name} was not downloaded from the hub ({reason})"
        ) from None


def _shards(index: Path) -> dict[str, str]:
    """Reads the name of the file that holds each tensor."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; it was edited or damaged")
    return shards


class ModelWeights:
    """A model's weights, read by tensor name; the rest of a file is not read.

    Args:
        model: the name of a bundled model, a local folder, or a hub id.
        revision: Revision of a hub model.

    Attributes:
        files: Path of the file that holds each tensor.

    Raises:
        ValueError: If the model has no safetensors weights or they are damaged.
    """

    def __init__(self, model: str, revision: str = "") -> None:
        self.model = model
        try:
            try:
                shards = _shards(model_file(model, revision, "model.safetensors.index.json"))
            except (FileNotFoundError, ValueError):
                whole = model_file(model, revision, "model.safetensors")
                with safe_open(whole, framework="pt") as weights:
                    shards = dict.fromkeys(weights.keys(), whole.name)
            self.files: dict[str, Path] = {name: model_file(model, revision, file) for name, file in shards.items()}
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"the weights of {model} cannot be read: {error}") from None

    def read(self, name: str) -> Tensor:
        """Reads one tensor in the dtype it is stored in.

        Raises:
            ValueError: If no tensor has that name, or its file is damaged.
        """
        return self._read(name, lambda weights: weights.get_tensor(name))

    def read_row(self, name: str, row: int) -> Tensor:
        """Reads one row of a tensor, the first axis left out; the other rows are not read.

        Raises:
            ValueError: If no tensor has that name, it has no such row, or its file is damaged.
        """
        return self._read(name, lambda weights: weights.get_slice(name)[row])

    def _read(self, name: str, get: Callable[[Any], Tensor]) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.model} has no weights named {name}")
        try:
            with safe_open(self.files[name], framework="pt") as weights:
                return get(weights)
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"{self.files[name]} cannot be read: {error}") from None


def read_embedding(model: str, revision: str = "") -> Tensor:
    """Reads the token embedding table `[V, D]` in float32 without loading the rest of the model.

    Raises:
        ValueError: If the model has no safetensors weights, they are damaged, or no table has a known name.
    """
    weights = ModelWeights(model, revision)
    name = next((name for name in EMBEDDINGS if name in weights.files), None)
    if name is None:
        raise ValueError(f"{model} has no token embedding table under a known name ({', '.join(EMBEDDINGS)})")
    return weights.read(name).float()
