"""Memory budgets for a given number of experts of the random test model, and the experts in its files."""

from pathlib import Path

import torch

from data.models.expert import ExpertFormat
from data.models.layout import MoELayout
from data.models.stored_experts import ExpertReader, stored_experts
from data.models.weights import ModelWeights
from runtime.offload.cache import LOADERS
from runtime.offload.memory import PAGE, ExpertShape
from tests.conftest import small_switch


def budget(experts: int) -> int:
    """Bytes of these many expert buffers and of the loader threads' read buffers."""
    shape = ExpertShape(ExpertFormat.plain(48, 32).shapes, torch.float32)
    return experts * shape.padded_bytes + LOADERS * shape.region_bytes[0] + PAGE


def stored_switch(folder: Path) -> ExpertReader:
    """The experts in a folder of `small_switch`."""
    model = small_switch()
    return stored_experts(ModelWeights(str(folder)), model, MoELayout.from_model(model, "random"))
