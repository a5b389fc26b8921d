"""Weights that torch.save wrote (pytorch_model.bin): opened by torch's safe loader alone, converted to safetensors.

A pickle can run code when it is opened. torch's safe loader (`weights_only=True`) builds tensors and containers and
nothing else; files that need more are refused.
"""

import hashlib
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.byte_sizes import show_bytes
from data.files import cache_folder, held, whole_folder, write_json

SHARD_BYTES = 256 << 20
"""Bytes of tensors in one converted file, which are in memory while it is written."""


def open_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped into memory; older files, which are no zip archives, are read as a whole.

    Raises:
        ValueError: If the file is damaged, holds more than tensors by name, or would run code.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        if mapped:
            _check_stored(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no file of tensors alone; opening it could run code, and it is refused: get the model as "
            "model.safetensors, or from a source that saves tensors"
        ) from None
    except Exception as error:  # of many kinds: zip, torch, the end of the file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be opened ({reason}); download it again") from None
    if not isinstance(found, dict) or not all(map(_is_plain, found, found.values())):
        raise ValueError(f"{path} holds other things than tensors by name, expected what model.state_dict() gives")
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_stored(path: Path) -> None:
    """Refuses compressed archives, which torch.save never writes: mapped, their bytes would be taken for numbers."""
    with zipfile.ZipFile(path) as archive:
        if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{packed[0]} is compressed")


def _is_plain(name: Any, value: Any) -> bool:
    """Whether this is a name and a dense tensor, all of whose values are in the file."""
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()


def converted(model: str, files: Mapping[str, Path]) -> Path:
    """A folder with the tensors of pickled files as safetensors, in the cache folder.

    It is made once for each state of the files (path, size, time of change). A process that needs it while another one
    converts waits for that one.

    Args:
        model: The model's name.
        files: File that holds each tensor.

    Raises:
        ValueError: If the folder cannot be written, or a file is damaged.
    """
    paths = sorted(set(files.values()))
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    folder = cache_folder() / "weights" / f"{Path(model).name}-{key}"
    try:
        with held(folder.parent, wait=True):
            if not folder.exists():
                size = show_bytes(sum(size for _, size, _ in state))
                print(f"Converting the weights of {model} ({size}) to safetensors once, in {folder}", file=sys.stderr)
                for left_over in folder.parent.glob(".*"):  # of a process that was killed
                    shutil.rmtree(left_over)
                with whole_folder(folder) as aside:
                    _convert(files, aside)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {model} could not be converted into {folder.parent} ({error}); name another folder in "
            "the environment variable SWITCHCAST_CACHE"
        ) from None
    return folder


def _convert(files: Mapping[str, Path], folder: Path) -> None:
    """Writes all tensors into shards of `SHARD_BYTES`, or of one larger tensor, and their index."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(files)):
        name = f"model-{number + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _shards(files: Mapping[str, Path]) -> Iterator[dict[str, Tensor]]:
    """The tensors, each with memory of its own: tied ones share it in pickled files."""
    shard: dict[str, Tensor] = {}
    for name, tensor in _tensors(files):
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
    yield shard


def _tensors(files: Mapping[str, Path]) -> Iterable[tuple[str, Tensor]]:
    for path in sorted(set(files.values())):
        tensors = open_pickled(path)
        for name in (name for name, file in files.items() if file == path):
            if name not in tensors:
                raise ValueError(f"{path} lacks {name}, which its index lists; download it again")
            yield name, tensors[name]
