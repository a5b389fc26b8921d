"""Fixtures around the made-up trace."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import VOCABULARY, WIDTH, make_batch, make_layout, time_splits, write_trace
from safetensors.torch import save_file

from data.layout import MoELayout
from data.trace import TokenBatch


@pytest.fixture(scope="session")
def host(tmp_path_factory) -> Path:
    """The folder of a model that has an embedding table and nothing else."""
    folder = tmp_path_factory.mktemp("host")
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"shared.weight": table}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def layout(host) -> MoELayout:
    return make_layout(str(host))


@pytest.fixture(scope="session")
def trace(tmp_path_factory, layout) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace"), layout, time_splits(24, 6, 8))


@pytest.fixture
def upcoming() -> TokenBatch:
    return make_batch(0, "steady", "test", np.random.default_rng(1)).tokens
