"""Export of a trained predictor: its folder, written completely or not at all, with provenance and a model card."""

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from predictor.checkpoint import CONFIG, WEIGHTS
from predictor.choice import loses
from predictor.evaluation.tables import Details, comparison_table
from predictor.forecaster import NeuralForecaster


def check_target(folder: Path, overwrite: bool) -> None:
    """Checks that a predictor may be written to a folder.

    Raises:
        ValueError: If the folder exists and is not a predictor, or is one and `overwrite` is false.
    """
    if not folder.exists():
        return
    if not ((folder / CONFIG).exists() and (folder / WEIGHTS).exists()):
        raise ValueError(f"{folder} exists and is not a predictor folder; name another one with --predictor")
    if not overwrite:
        raise ValueError(
            f"{folder} holds a predictor already; name another folder with --predictor, or replace it with --overwrite"
        )


@contextmanager
def predictor_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to write to; it becomes `folder` if the block ends without an error."""
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new = aside / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(aside / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(aside)


def git_revision() -> str | None:
    """Commit of this code, with "-dirty" where files differ from it; None outside a git folder."""
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() or None


def provenance(seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """Origin of a predictor: command, time, git revision, seconds of the fit, library versions."""
    libraries = ("torch", "lightning", "transformers", "numpy")
    return {
        "command": ["train.py", *sys.argv[1:]],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "training_seconds": round(seconds, 1),
        "training_cpu_seconds": round(cpu_seconds, 1),
        "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
    }


def model_card(forecaster: NeuralForecaster, details: Details, about: dict[str, Any], errors: dict[str, float]) -> str:
    """README.md of a predictor folder, with its load error and that of others on the validation batches."""
    beside = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    warning = "" if (sentence := loses(errors)) is None else f"\n**{sentence[0].upper()}{sentence[1:]}.**\n"
    layout, architecture = forecaster.layout, forecaster.network.architecture
    parameters = sum(value.numel() for value in forecaster.network.parameters())
    direction = "bidirectional" if architecture.bidirectional else "left-to-right"
    return f"""---
library_name: switchcast
tags: [mixture-of-experts, switch-transformers, expert-load-forecasting]
---
# Expert load predictor for {layout.model_id}

Forecasts how many tokens of the next batch are dispatched to each of {layout.num_experts} experts, in all
{layout.num_layers} MoE layers of `{layout.model_id}` (layout fingerprint `{layout.fingerprint()}`), from the batch's
encoder tokens and the loads of the batches before it. It never changes the model's outputs.
{warning}
- Network: {architecture.depth} {direction} {architecture.cell.upper()} layers of width {architecture.width}, \
{parameters:,} parameters. The host model's embedding table is read from the host model.
- Training: {about["training_seconds"]} s, command `python {" ".join(about["command"])}`; settings in run.yaml.
- Load it with `predictor.load_predictor(folder)`, which needs torch and safetensors only.
- Load error on the validation batches, which also chose the weights: {beside}. The runtime uses the best of
  these unless told otherwise.

## Load error on held-out batches
Total variation of forecast and true share (0 to 1, lower is better): mean over MoE layers and batches, 95 % interval.

{comparison_table(details, "load_tv")}

## Limits
A predictor fits the routers of one model; another model is refused. Forecasts are worse for text unlike the training
trace (stream `unseen`, where the trace has one). Decoder tokens are not known before the batch runs: decoder layers are
forecast from the encoder's tokens and from history.
"""
