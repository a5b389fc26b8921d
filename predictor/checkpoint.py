"""Saving and loading a trained predictor: the folder with model.safetensors and config.json.

    from predictor import load_predictor

    predictor = load_predictor("outputs/predictor")

`load_adaptive` loads it wrapped as a forecaster that learns from the batches that run; it begins with the state that
`save_state` wrote, if there is one. docs/checkpoint-format.md describes the folder. Loading needs torch, numpy, numba
and safetensors only.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import check_fetched, read_json, sha256, whole_file, write_json
from data.models.layout import MoELayout
from data.models.weights import read_embedding
from data.traces.recordings import TRACE_JSON
from predictor.adaptive import AdaptiveForecaster, State
from predictor.forecaster import NeuralForecaster
from predictor.hub import download_predictor, is_hub_id
from predictor.network import Architecture, LoadNetwork

FORMAT_VERSION = 1
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "adaptive.safetensors"
SPREAD = "spread"
FORMER = ("known_tokens", "usual_share_known")
"""Tensors of folders written by earlier versions, which are not used any more."""


def save_predictor(folder: Path, forecaster: NeuralForecaster, about: dict[str, Any] | None = None) -> None:
    """Writes model.safetensors and config.json; of embedding tables only the network's own is saved.

    Args:
        folder: Folder to write into.
        forecaster: The trained predictor.
        about: Further entries of config.json: metrics, segments, provenance.
    """
    state = {name: value.contiguous() for name, value in forecaster.network.state_dict().items()}
    with whole_file(folder / WEIGHTS) as aside:
        aside.write_bytes(save(state | {SPREAD: forecaster.spread}))
    config = {
        "format_version": FORMAT_VERSION,
        "layout": forecaster.layout.to_json(),
        "architecture": asdict(forecaster.network.architecture),
        "weights_sha256": sha256(folder / WEIGHTS),
    }
    write_json(folder / CONFIG, config | (about or {}))


def local_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a predictor; one on the hub is downloaded.

    Raises:
        ValueError: If it cannot be downloaded.
    """
    folder = Path(folder_or_hub_id)
    if not folder.is_dir() and is_hub_id(folder_or_hub_id):
        return download_predictor(str(folder_or_hub_id), revision)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks config.json.

    Raises:
        ValueError: If the folder holds no predictor of this format.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected a predictor written by `python train.py`, or the hub id 'owner/name' "
            "of one"
        )
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if "format_version" not in config:
        hint = f"; it is a trace: `python train.py --data.trace {folder}` trains one" * (folder / TRACE_JSON).exists()
        raise ValueError(f"{folder} holds no predictor; expected the folder that `python train.py` wrote{hint}")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format version {config['format_version']}; this version reads "
            f"{FORMAT_VERSION}; train the predictor again"
        )
    kinds = {"layout": dict, "architecture": dict, "weights_sha256": str}
    if missing := [name for name, kind in kinds.items() if not isinstance(config.get(name), kind)]:
        raise ValueError(f"{folder / CONFIG} lacks {sorted(missing)}; train the predictor again")
    return config


def _read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path} is missing; train the predictor again")
    check_fetched(path)
    if (digest := sha256(path)) != expected:
        raise ValueError(
            f"{path} has sha256 {digest[:12]}, {CONFIG} expects {expected[:12]}; the file was cut short, edited or "
            "swapped"
        )
    try:
        with safe_open(path, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} has NaN or infinite numbers in {', '.join(wrong)}; train the predictor again")
    return tensors


def differences(layout: MoELayout, trained: MoELayout) -> str:
    """What tells two models apart, such as `: family qwen3_moe, not olmoe`; empty if it is their routers' weights."""
    names = {"family": "family", "experts_per_token": "experts per token", "num_experts": "experts", "layers": "layers"}
    pairs = [(name, getattr(layout, field), getattr(trained, field)) for field, name in names.items()]
    found = [f"{name} {found}, not {wanted}" for name, found, wanted in pairs if found != wanted]
    if not found and layout.routers and trained.is_same(replace(layout, dense="")):
        return ": the same routers, other weights before them"
    return f": {found[0]}" if found else ""


def load_predictor(
    folder_or_hub_id: str | Path,
    layout: MoELayout | None = None,
    embedding: Tensor | None = None,
    revision: str | None = None,
) -> NeuralForecaster:
    """Loads a predictor from a folder or from the Hugging Face hub.

    Args:
        folder_or_hub_id: A local folder, or a hub id "owner/name" as a string.
        layout: Layout of the model to forecast for; None means the model that the predictor was trained for.
        embedding: Token embeddings `[V, D]` of that model; None reads them from the model that `layout` names. The
            predictor runs on the CPU, whatever device they are on. Not used by a predictor with its own table.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: If there is no such predictor, or it is damaged, of another format, or trained for another model.

    Example:
        >>> import torch
        >>> predictor = load_predictor("tests/predictor/fixtures/v1", embedding=torch.zeros(60, 16))
        >>> forecast = predictor.forecast({"input_ids": [[3, 14, 15]], "attention_mask": [[1, 1, 1]]})
        >>> forecast.load.shape  # MoE layers, experts
        (3, 8)
    """
    folder = local_folder(folder_or_hub_id, revision)
    config = read_config(folder)
    trained = MoELayout.from_json(config["layout"])
    if layout is not None and not layout.is_same(trained):
        raise ValueError(
            f"{folder} was trained for {trained.model_id} (fingerprint {trained.fingerprint()}), the model is "
            f"{layout.model_id} (fingerprint {layout.fingerprint()}{differences(layout, trained)}); train a predictor "
            "for it"
        )
    weights = _read_weights(folder / WEIGHTS, config["weights_sha256"])
    try:
        network = LoadNetwork(trained, Architecture(**config["architecture"]))
        spread = weights.pop(SPREAD)
        network.load_state_dict({name: value for name, value in weights.items() if name not in FORMER})
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG} and {WEIGHTS} do not fit together: {error}") from None
    if (expected := (2, trained.num_layers, 3)) != tuple(spread.shape):
        raise ValueError(f"{folder / WEIGHTS} has a spread of shape {tuple(spread.shape)}, expected {expected}")
    if network.embedding is not None:
        return NeuralForecaster(trained, network, None, spread)
    if embedding is None:
        model = layout or trained
        embedding = read_embedding(model.model_id, model.revision)
    if embedding.shape != (trained.vocab_size, trained.d_model):
        raise ValueError(
            f"the embedding table is {tuple(embedding.shape)}, {folder} needs {(trained.vocab_size, trained.d_model)}"
        )
    return NeuralForecaster(trained, network, embedding.float().cpu(), spread)


def save_state(folder: Path, state: State) -> None:
    """Writes the `state` of an `AdaptiveForecaster` to the folder of the predictor that it wraps."""
    config = read_config(folder)
    about = {"weights_sha256": config["weights_sha256"], "fingerprint": config["layout"]["fingerprint"]}
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    with whole_file(folder / STATE) as aside:
        aside.write_bytes(safetensors.numpy.save(arrays, about))


def load_adaptive(
    folder_or_hub_id: str | Path,
    layout: MoELayout | None = None,
    embedding: Tensor | None = None,
    revision: str | None = None,
) -> AdaptiveForecaster:
    """Loads a predictor that goes on learning, from where its state ends if the folder holds one.

    Arguments and errors are those of `load_predictor`.

    Raises:
        ValueError: Also if the state is damaged, or of another model or other weights.
    """
    folder = local_folder(folder_or_hub_id, revision)
    learned = load_predictor(folder, layout, embedding)
    adaptive = AdaptiveForecaster(learned, learned.layout.num_layers, learned.layout.num_experts)
    if (folder / STATE).exists():
        _restore(folder, adaptive)
    return adaptive


def _restore(folder: Path, adaptive: AdaptiveForecaster) -> None:
    config, path = read_config(folder), folder / STATE
    mend = "delete the file to begin anew, or train the predictor again"
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}; {mend}") from None
    for name, found in (("fingerprint", config["layout"]["fingerprint"]), ("weights_sha256", config["weights_sha256"])):
        if about.get(name) != found:
            raise ValueError(f"{path} has {name} {about.get(name)}, {CONFIG} has {found}: another model's; {mend}")
    try:
        adaptive.restore(state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; {mend}") from None
