"""Probes of the next MoE layer in a predictor's folder: written by `Engine.save_probes`, read when an engine opens."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.files import check_fetched, whole_file
from data.models.layout import MoELayout
from runtime.offload.layer_ahead import ModelProbes

PROBES = "layer_ahead.safetensors"
FINGERPRINT = "fingerprint"
MEND = "delete the file, and the probes begin anew"


def save_probes(folder: Path, probes: ModelProbes, layout: MoELayout) -> Path:
    """Writes layer_ahead.safetensors; returns its path.

    Raises:
        ValueError: If there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected the predictor's folder, which train.py wrote")
    content = {name: value.cpu().contiguous() for name, value in probes.state().items()}
    with whole_file(folder / PROBES) as aside:
        aside.write_bytes(save(content, {FINGERPRINT: layout.fingerprint()}))
    return folder / PROBES


def restore_probes(folder: Path, probes: ModelProbes, layout: MoELayout) -> None:
    """Has probes go on from layer_ahead.safetensors, if the folder has one.

    Raises:
        ValueError: If it is damaged, or of another model.
    """
    path = folder / PROBES
    if not path.exists():
        return
    check_fetched(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(FINGERPRINT)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}; {MEND}") from None
    if found != layout.fingerprint():
        raise ValueError(
            f"{path} was learned with another model (fingerprint {found}), this one is {layout.model_id} "
            f"(fingerprint {layout.fingerprint()}); {MEND}"
        )
    try:
        probes.restore(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {MEND}") from None
