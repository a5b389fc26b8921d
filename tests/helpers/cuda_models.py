"""Models on pretended devices."""

import copy

import torch

from data.models.model import LoadedModel, layout_of


def on_cuda(switch: LoadedModel, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A copy of a live model on the current device."""
    model = copy.deepcopy(switch.model).to("cuda", dtype)
    return LoadedModel(model, None, layout_of(model, "random"))
