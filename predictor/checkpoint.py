"""A trained predictor as a folder: model.safetensors, config.json, and for people README.md and run.yaml.

docs/checkpoint-format.md describes it. Loading needs torch and safetensors only.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import read_json, sha256, whole_file, write_json
from data.models.layout import MoELayout
from predictor.familiarity import Familiarity
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
BEFORE = {"decoder": "pooled"}
"""What an architecture was that does not say: folders written before there was a choice."""
SPREAD, KNOWN, USUAL = "spread", "known_tokens", "usual_share_known"


def save_predictor(folder: Path, forecaster: NeuralForecaster, about: dict[str, Any] | None = None) -> None:
    """Writes weights and config.json; the host model's embedding table stays where it is.

    Args:
        folder: Folder to write into.
        forecaster: The trained predictor.
        about: Further entries of config.json: metrics, provenance.
    """
    state = {name: value.contiguous() for name, value in forecaster.network.state_dict().items()}
    with whole_file(folder / WEIGHTS) as aside:
        aside.write_bytes(save(state | {SPREAD: forecaster.spread} | _familiar_tensors(forecaster.familiarity)))
    config = {
        "format_version": FORMAT_VERSION,
        "layout": forecaster.layout.to_json(),
        "architecture": asdict(forecaster.network.architecture),
        "weights_sha256": sha256(folder / WEIGHTS),
    }
    write_json(folder / CONFIG, config | (about or {}))


def _familiar_tensors(familiarity: Familiarity | None) -> dict[str, Tensor]:
    return {} if familiarity is None else {KNOWN: familiarity.known, USUAL: torch.tensor(familiarity.usual)}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks config.json.

    Raises:
        ValueError: If the folder holds no predictor of a format this version reads.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a predictor written by `python train.py`")
    config = read_json(folder / CONFIG)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format version {config.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    if missing := {"layout", "architecture", "weights_sha256"} - config.keys():
        raise ValueError(f"{folder / CONFIG} lacks {sorted(missing)}")
    return config


def _read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path} is missing; train the predictor again")
    if (digest := sha256(path)) != expected:
        raise ValueError(
            f"{path} has sha256 {digest[:12]}, {CONFIG} says {expected[:12]}; it was cut short, edited or swapped"
        )
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def load_predictor(path: Path, layout: MoELayout | None = None, embedding: Tensor | None = None) -> NeuralForecaster:
    """Loads a predictor folder.

    Args:
        path: The folder.
        layout: The model it is to forecast for; None accepts the model it was trained for.
        embedding: That model's token embeddings `[V, D]`; read from the model by its stored name by default.

    Raises:
        ValueError: If the folder is damaged, of another format, or was trained for another model.
    """
    path = Path(path)
    config = read_config(path)
    trained = MoELayout.from_json(config["layout"])
    if layout is not None and layout.fingerprint() != trained.fingerprint():
        raise ValueError(
            f"{path} was trained for {trained.model_id} (fingerprint {trained.fingerprint()}), "
            f"the model is {layout.model_id} (fingerprint {layout.fingerprint()}); train a predictor for it"
        )
    weights = _read_weights(path / WEIGHTS, config["weights_sha256"])
    try:
        network = LoadNetwork(trained, Architecture(**BEFORE | config["architecture"]))
        spread = weights.pop(SPREAD)
        spread = torch.nn.functional.pad(spread, (0, 3 - spread.shape[-1]))  # two weights before there was a third
        familiarity = Familiarity(weights.pop(KNOWN), float(weights.pop(USUAL))) if KNOWN in weights else None
        network.load_state_dict(weights)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path / CONFIG} and {WEIGHTS} do not fit together: {error}") from None
    if embedding is None:
        from data.models.switch import (
            read_embedding,  # only here: it knows the hub, which a runtime with a model needs not
        )

        place = layout or trained
        embedding = read_embedding(place.model_id, place.revision)
    if embedding.shape != (trained.vocab_size, trained.d_model):
        raise ValueError(
            f"the embedding table is {tuple(embedding.shape)}, {path} needs {(trained.vocab_size, trained.d_model)}"
        )
    return NeuralForecaster(trained, network, embedding.float(), spread, familiarity)
