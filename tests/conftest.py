"""Small real models and traces that several tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from data.models.layout import MoELayout
from data.models.model import LoadedModel
from data.pretrain.switch import SENTINELS
from data.pretrain.tokenizer import train_tokenizer
from data.text.document import Document

# The same examples in every run; deadlines would fail on a busy machine.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

WORDS = ["expert", "router", "token", "batch", "layer", "device", "replica", "slot", "load", "share"]
TEXTS = [" ".join(WORDS[(start * step) % len(WORDS)] for step in range(3, 40)) for start in range(1, 12)]


def small_switch(
    num_experts: int = 8, capacity: int = 6, seed: int = 0, **settings: Any
) -> SwitchTransformersForConditionalGeneration:
    """A Switch model with random weights: 2 + 2 blocks, one MoE layer in each stack, and routers that are skewed."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": num_experts,
        "expert_capacity": capacity, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**shape | settings)).eval()


def write_switch(folder: Path) -> Path:
    """Writes a model folder in the hub's format, with random weights and a tokenizer of its own."""
    small_switch().save_pretrained(folder)
    documents = [Document("words", text) for text in TEXTS]
    train_tokenizer(documents, 400, SENTINELS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model, shared by all tests."""
    return write_switch(tmp_path_factory.mktemp("models") / "switch-random-8")


@pytest.fixture
def switch() -> LoadedModel:
    """A live random model with its layout, without a tokenizer."""
    model = small_switch()
    return LoadedModel(model, None, MoELayout.from_model(model, "random"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Operators with one thread: on tiny tensors several wait for each other, and kernels may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
