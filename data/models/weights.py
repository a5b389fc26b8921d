"""ModelWeights: reads single tensors of a model's files, bundled, local or on the Hugging Face hub.

The files are safetensors, or `pytorch_model.bin` and its shards where a model has nothing else (google/switch-base-*).
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import first_line
from data.files import check_fetched, read_json
from data.models.pickled import converted, open_pickled

BUNDLED = "switch-mini-64"
"""Name of the model that commands run unless told otherwise."""
BUNDLED_MODELS = (BUNDLED, "qwen3-mini-64")
"""Names of the models that this package contains; see their README.md in data/bundled."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""A model's weights, or the index of their shards, in the order in which transformers looks for them."""
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
        FileNotFoundError: If the model has no such file.
        ValueError: If the file cannot be downloaded, or is a pointer of Git LFS.
    """
    place = locate(model)
    if not Path(place).is_dir():
        return _download(place, name, revision)
    path = Path(place) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a model folder with {name}")
    check_fetched(path)
    return path


def _download(model: str, name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download  # only here: local folders do not need it
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision or None))
    except RemoteEntryNotFoundError:
        raise FileNotFoundError(f"{model} has no {name} on the hub") from None
    except Exception as error:
        reason = first_line(error)
        raise ValueError(
            f"{model} is not a local folder and {name} was not downloaded from the hub ({reason})"
        ) from None


def weights_file(model: str, revision: str = "") -> Path:
    """The first of `WEIGHT_FILES` that the model has.

    Raises:
        ValueError: If it has none, or none can be downloaded.
    """
    unreachable: ValueError | None = None
    for name in WEIGHT_FILES:
        try:
            return model_file(model, revision, name)
        except FileNotFoundError:
            continue
        except ValueError as error:  # without a network, a file that was downloaded before may follow
            if Path(locate(model)).is_dir():
                raise
            unreachable = unreachable or error
    raise unreachable or ValueError(f"{model} has no weights; expected {' or '.join(WEIGHT_FILES)}")


def is_pickled(path: Path) -> bool:
    """Whether weights, or the shards of an index, are files of torch.save and not safetensors."""
    return path.name.startswith("pytorch_model")


class ModelWeights:
    """A model's weights, read by tensor name; the rest of a file is not read.

    Args:
        model: the name of a bundled model, a local folder, or a hub id.
        revision: Revision of a hub model.

    Attributes:
        files: Path of the file that holds each tensor.

    Raises:
        ValueError: If the model has no weights, or they are damaged.
    """

    def __init__(self, model: str, revision: str = "") -> None:
        self.model, self._opened = model, dict[Path, dict[str, Tensor]]()
        try:
            first = weights_file(model, revision)
            self.pickled = is_pickled(first)
            if first.suffix == ".json":
                shards = _shards(first)
                paths = {name: model_file(model, revision, name) for name in sorted(set(shards.values()))}
                self.files: dict[str, Path] = {name: paths[file] for name, file in shards.items()}
            else:
                self.files = dict.fromkeys(self._names(first), first)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"the weights of {model} cannot be read: {error}") from None

    def _names(self, path: Path) -> list[str]:
        if self.pickled:
            return list(self._open(path))
        with safe_open(path, framework="pt") as weights:
            return list(weights.keys())

    def _open(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a pickled file, mapped into memory once."""
        if path not in self._opened:
            self._opened[path] = open_pickled(path)
        return self._opened[path]

    def read(self, name: str) -> Tensor:
        """Reads one tensor in the dtype it is stored in.

        Raises:
            ValueError: If no tensor has that name, or its file is damaged.
        """
        return self._read(name)

    def read_row(self, name: str, row: int) -> Tensor:
        """Reads one row of a tensor, the first axis left out; the other rows are not read.

        Raises:
            ValueError: If no tensor has that name, it has no such row, or its file is damaged.
        """
        return self._read(name, row)

    def _read(self, name: str, row: int | None = None) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.model} has no weights named {name}")
        path = self.files[name]
        try:
            if self.pickled:
                tensor = self._open(path)[name]
                return tensor if row is None else tensor[row]
            with safe_open(path, framework="pt") as weights:
                found: Tensor = weights.get_tensor(name) if row is None else weights.get_slice(name)[row]
                return found
        except KeyError:
            raise ValueError(f"{path} lacks {name}, which its index lists; download it again") from None
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None

    def as_safetensors(self) -> "ModelWeights":
        """The same weights in safetensors files, from which single experts can be read by their offset.

        Pickled files are converted into the cache folder once, which is said on stderr.

        Raises:
            ValueError: If there is no room for the converted files, or a pickled one is damaged.
        """
        if not self.pickled:
            return self
        found = ModelWeights(str(converted(self.model, self.files)))
        found.model = self.model
        return found


def _shards(index: Path) -> dict[str, str]:
    """Reads the name of the file that holds each tensor; the files lie beside the index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; it was edited or damaged")
    if outside := sorted(name for name in shards.values() if Path(name).name != name):
        raise ValueError(f"{index} names the file {outside[0]}, expected one beside it; it was edited or damaged")
    return shards


def read_embedding(model: str, revision: str = "") -> Tensor:
    """Reads the token embedding table `[V, D]` in float32 without loading the rest of the model.

    Raises:
        ValueError: If the model has no weights, they are damaged, or no table has a known name.
    """
    weights = ModelWeights(model, revision)
    name = next((name for name in EMBEDDINGS if name in weights.files), None)
    name = name or next((name for name in _tied_embeddings(model, revision) if name in weights.files), None)
    if name is None:
        raise ValueError(f"{model} has no token embedding table under a known name ({', '.join(EMBEDDINGS)})")
    return weights.read(name).float().contiguous()


def _tied_embeddings(model: str, revision: str) -> list[str]:
    """All names of the embedding table in the model, which files may hold under any of them."""
    from data.models.model import outline  # only here: it takes transformers, and few files need it

    live = outline(model, revision).model
    table = live.get_input_embeddings().weight
    return [name for name, parameter in live.named_parameters(remove_duplicate=False) if parameter is table]
