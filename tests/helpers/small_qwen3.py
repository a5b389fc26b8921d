"""A small decoder-only model in a folder, shared by tests of traces and predictors."""

import shutil
from pathlib import Path

from tests.data.models.test_registered import small_qwen3


def write_qwen3(folder: Path, tokenizer: Path) -> Path:
    """Writes a random Qwen3-MoE, 3 of 8 experts a token, with the tokenizer of another model folder."""
    small_qwen3(vocab_size=400).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
