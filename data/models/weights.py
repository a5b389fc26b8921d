"""ModelWeights: the tensors of a model's safetensors files, read one at a time; where those files come from."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import read_json

BUNDLED = "switch-mini-64"
"""Name of the model that comes with this package; see data/bundled/switch-mini-64/README.md."""


def locate(model: str) -> str:
    """The folder of the bundled model or a local folder as a path; anything else is taken for a hub id.

    Raises:
        ValueError: If `model` looks like a path and no folder is there.
    """
    if model == BUNDLED:
        return str(Path(__file__).parents[1] / "bundled" / BUNDLED)
    if model and Path(model).is_dir():
        return model
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"{model} is not a folder; expected '{BUNDLED}', a local model folder, or a hub id 'owner/name'"
        )
    return model


def model_file(model: str, revision: str, name: str) -> Path:
    """A file of the model, downloaded if it is on the hub.

    Raises:
        FileNotFoundError: If the model's folder has no such file.
        ValueError: If the hub does not give it.
    """
    from huggingface_hub import hf_hub_download  # only here: local folders load without it

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


def _shards(index: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; it was edited or damaged")
    return shards


class ModelWeights:
    """Tensors by name; of each file only what is asked for is read.

    Args:
        model: `BUNDLED`, a local folder, or a hub id.
        revision: Revision of a hub model.

    Attributes:
        files: The file that holds each tensor.

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
        """One tensor as it is stored.

        Raises:
            ValueError: If there is none of that name, or its file is damaged.
        """
        if name not in self.files:
            raise ValueError(f"{self.model} has no weights named {name}")
        try:
            with safe_open(self.files[name], framework="pt") as weights:
                tensor: Tensor = weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.files[name]} cannot be read: {error}") from None
        return tensor
