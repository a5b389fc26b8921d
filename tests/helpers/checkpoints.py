"""Model folders in the forms in which people publish them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file, save_model


def as_pickled(folder: Path, shards: int = 1) -> Path:
    """Replaces a folder's model.safetensors by what older versions wrote: pytorch_model.bin, tied weights and all."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        if "shared.weight" in tensors:
            tensors[name] = tensors["shared.weight"]
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, end = sorted(tensors), f"of-{shards:05d}.bin"
    weight_map = {name: f"pytorch_model-{1 + place % shards:05d}-{end}" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def as_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """Stores a folder's weights in another data type."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_aliased(folder: Path, model: torch.nn.Module) -> Path:
    """Stores a folder's tied embedding table under the name that `save_model` keeps, the first in the alphabet."""
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
