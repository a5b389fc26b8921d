"""Models on pretended devices."""

import copy

import torch

from data.models.layout import MoELayout
from data.models.switch import LoadedSwitch


def on_cuda(switch: LoadedSwitch, dtype: torch.dtype = torch.float32) -> LoadedSwitch:
    """A copy of a live model on the current device."""
    model = copy.deepcopy(switch.model).to("cuda", dtype)
    return LoadedSwitch(model, None, MoELayout.from_model(model, "random"))
