"""Writes a model of any size with random weights, shard by shard, so that it may be larger than memory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from data.models.weights import locate

SHARD = 1 << 30
"""Bytes of one file, and thus of the memory that writing takes."""


def write_random(kind: type[Any], config: Any, out: Path, like: str, dtype: torch.dtype, seed: int) -> None:
    """Writes a model's folder; does nothing if a complete model is there already.

    Args:
        kind: The model's class.
        config: Its configuration.
        out: The folder.
        like: Bundled model whose tokenizer it gets.
        dtype: Dtype of the stored weights.
        seed: Seed of the weights.
    """
    index = out / "model.safetensors.index.json"
    if index.exists():
        return
    with torch.device("meta"):
        model = kind(config)
    tied = model.all_tied_weights_keys
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    generator, parts = torch.Generator().manual_seed(seed), list(shards(shapes, dtype))
    out.mkdir(parents=True, exist_ok=True)
    holder: dict[str, str] = {}
    for number, names in enumerate(track(parts, f"writing {out.name}", console=Console(stderr=True)), 1):
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: random_weight(shapes[name], generator).to(dtype) for name in names}
        save_file(tensors, out / shard, {"format": "pt"})
        holder |= dict.fromkeys(names, shard)
    config.save_pretrained(out)
    for path in Path(locate(like)).glob("tokenizer*"):
        shutil.copy(path, out)
    index.write_text(json.dumps({"metadata": {}, "weight_map": holder}))  # written last: it marks the model as complete


def shards(shapes: dict[str, torch.Size], dtype: torch.dtype) -> Iterator[list[str]]:
    """Yields the names of each shard's tensors, in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * dtype.itemsize > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * dtype.itemsize
    yield names


def random_weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random matrix, scaled so that it does not change the magnitude of hidden states; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape)
    scale: float = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale
