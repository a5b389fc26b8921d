"""Byte budgets in numbers of experts."""

import torch

from runtime.offload.cache import LOADERS
from runtime.offload.memory import PAGE, ExpertShape


def budget(experts: int) -> int:
    """Bytes for so many experts of the random model, and the buffers they are read through."""
    room = ExpertShape(48, 32, torch.float32).room
    return 2 * experts * room + LOADERS * room + PAGE
