"""Loading a model for an engine: the model itself, and where the weights of its experts come from."""

from pathlib import Path
from typing import Any

from data.models.device import Device
from data.models.model import Dtype, LoadedModel, load_dense, load_model
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights
from runtime.distributed.ranks import Ranks
from runtime.engine.adapter import adapter_of
from runtime.experts.weights import ExpertSource, FileWeights
from runtime.offload.slots import MemoryBudget


def load(
    model: Any, revision: str, dtype: Dtype, device_memory: int | str | None, host_memory: int | str | None,
    ranks: Ranks,
) -> tuple[LoadedModel, ExpertSource | MemoryBudget]:  # fmt: skip
    """The model on the rank's device, and where its experts' weights come from.

    Arguments are the engine's.

    Raises:
        ValueError: If the model cannot be loaded, or is in memory already beside a budget.
    """
    if not isinstance(model, str | Path):
        if device_memory is not None:
            raise ValueError(
                f"device_memory is {device_memory}, but the model is in memory already; give its folder or hub id "
                "instead, so that experts can be read one by one"
            )
        loaded = model if isinstance(model, LoadedModel) else LoadedModel.of(model)
        return loaded, adapter_of(loaded).weights()
    name, whole = str(model), ranks.world == 1 and device_memory is None
    loaded = (load_model if whole else load_dense)(name, revision, dtype)
    loaded.to(ranks.device)
    if whole:
        return loaded, adapter_of(loaded).weights()
    weights = ModelWeights(name, revision)
    if device_memory is None:
        return loaded, FileWeights(stored_experts(weights, loaded.model, loaded.layout))
    stored = stored_experts(weights.as_safetensors(), loaded.model, loaded.layout)
    return loaded, MemoryBudget(device_memory, host_memory, stored)


def device_of(model: Any, asked: Device | None) -> Device | None:
    """The kind of device to use; a model object stays where it is.

    Raises:
        ValueError: If the model lies elsewhere than asked for.
    """
    if isinstance(model, str | Path):
        return asked
    found = getattr(getattr(model, "model", model), "device", None)
    if asked is not None and found is not None and found.type != asked:
        raise ValueError(f"device is '{asked}', but the model is on {found}; move it there, or leave device out")
    return asked if found is None else found.type
