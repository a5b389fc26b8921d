"""Model folders that hold as little as a test needs."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.made_up_trace import VOCABULARY, WIDTH


def write_table(folder: Path) -> Path:
    """Writes the folder of a model that consists of an embedding table alone, that of made-up traces."""
    folder.mkdir(exist_ok=True)
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"shared.weight": table}, folder / "model.safetensors")
    return folder
