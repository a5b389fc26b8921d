"""Writes a Switch model of any size with random weights, shard by shard, so that it may be larger than memory.

    python -m benchmarks.support.make_switch --out outputs/switch-base-128 --experts 128

The default sizes are switch-base's. With 128 experts the model takes 29 GB on disk in float32, and one shard at a time
in memory. The tokenizer is the bundled model's.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from data.cli import from_command_line, user_errors
from data.models.weights import BUNDLED, locate

SHARD = 1 << 30
"""Bytes of one file, and thus of the memory that writing takes."""
TIED = ("embed_tokens.weight", "lm_head.weight")


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


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random matrix, scaled so that it does not change the magnitude of hidden states; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape)
    scale: float = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale


def make_switch(
    out: Path = Path("outputs/switch-random"),
    experts: int = 128,
    blocks: int = 12,
    d_model: int = 768,
    d_ff: int = 3072,
    heads: int = 12,
    capacity: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> None:
    """Writes the model folder; does nothing if a complete model is there already.

    Args:
        out: The folder.
        experts: Experts of each MoE layer.
        blocks: Blocks of each stack; every other one has an MoE layer.
        d_model: Size of the hidden states.
        d_ff: Inner size of an expert.
        heads: Attention heads.
        capacity: Expert capacity: tokens of one sequence that an expert accepts.
        dtype: Dtype of the stored weights.
        seed: Seed of the weights.
    """
    index = out / "model.safetensors.index.json"
    if index.exists():
        return
    config = SwitchTransformersConfig(
        vocab_size=32128, d_model=d_model, d_kv=d_model // heads, d_ff=d_ff, num_heads=heads, num_experts=experts,
        expert_capacity=capacity, num_layers=blocks, num_sparse_encoder_layers=blocks // 2,
        num_decoder_layers=blocks, num_sparse_decoder_layers=blocks // 2, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    shapes = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(TIED)}
    generator, kind = torch.Generator().manual_seed(seed), getattr(torch, dtype)
    parts = list(shards(shapes, kind))
    out.mkdir(parents=True, exist_ok=True)
    holder: dict[str, str] = {}
    for number, names in enumerate(track(parts, f"writing {out.name}", console=Console(stderr=True)), 1):
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: random_weight(name, shapes[name], generator).to(kind) for name in names}
        save_file(tensors, out / shard, {"format": "pt"})
        holder |= dict.fromkeys(names, shard)
    config.save_pretrained(out)
    for path in Path(locate(BUNDLED)).glob("tokenizer*"):
        shutil.copy(path, out)
    index.write_text(json.dumps({"metadata": {}, "weight_map": holder}))  # written last: it marks the model as complete


if __name__ == "__main__":
    with user_errors():
        from_command_line(make_switch)
