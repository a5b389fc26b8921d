"""Memory budgets for a given number of experts of the random test model."""

import torch

from runtime.offload.cache import LOADERS
from runtime.offload.memory import PAGE, ExpertShape


def budget(experts: int) -> int:
    """Bytes of these many expert buffers and of the loader threads' read buffers."""
    padded = ExpertShape(48, 32, torch.float32).padded_bytes
    return 2 * experts * padded + LOADERS * padded + PAGE
