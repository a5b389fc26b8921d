"""Loading for an engine: the model, where the weights of its experts come from, and the forecaster."""

from pathlib import Path
from typing import Any, get_args

from data.arguments import check_choice
from data.files import sha256
from data.models.device import Device
from data.models.model import Dtype, LoadedModel, load_dense, load_model
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights
from predictor.choice import Choice, open_forecaster
from predictor.forecast import Forecaster
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


def open_predictor(
    loaded: LoadedModel, predictor: Forecaster | Path | str | None, forecast: Choice
) -> tuple[Forecaster | None, str]:
    """The forecaster for a model, and a digest of the weights of a predictor folder.

    Arguments are the engine's.

    Raises:
        TypeError: If `predictor` is nothing that forecasts.
        ValueError: If it cannot be loaded, or does not go with `forecast`.
    """
    check_choice("forecast", forecast, get_args(Choice))
    if predictor is not None and not isinstance(predictor, str | Path):
        if isinstance(predictor, type) or not hasattr(predictor, "forecast"):
            kind = predictor.__name__ if isinstance(predictor, type) else type(predictor).__name__
            raise TypeError(f"predictor is {kind}, expected a folder, a hub id, or a Forecaster")
        if forecast != "auto":
            raise ValueError(f"forecast is '{forecast}' beside a Forecaster; leave one of them out")
        return predictor, "none"
    table = loaded.model.get_input_embeddings().weight.detach()
    forecaster = open_forecaster(predictor, forecast, loaded.layout, table)
    if predictor is None:
        return forecaster, "none"
    weights = Path(predictor) / "model.safetensors"
    return forecaster, sha256(weights) if weights.exists() else str(predictor)


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
