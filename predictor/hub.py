"""Predictors on the Hugging Face hub: upload and download of the folder described in docs/checkpoint-format.md.

    load_predictor("owner/name")             # predictor.load_predictor downloads it
    predictor.push_to_hub("owner/name")      # NeuralForecaster.push_to_hub uploads it

huggingface_hub is imported on use, so that local folders load without it.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from predictor.checkpoint import CONFIG, WEIGHTS, save_predictor

if TYPE_CHECKING:
    from predictor.forecaster import NeuralForecaster


def is_hub_id(place: str | Path) -> bool:
    """Whether `place` has the form "owner/name"; a `Path` never has."""
    return isinstance(place, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place) is not None


def download_predictor(repo_id: str, revision: str | None = None) -> Path:
    """Downloads weights and configuration of a predictor, or finds them in the hub's cache; returns their folder.

    Raises:
        ValueError: If the hub does not have them, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # huggingface_hub raises its own errors and those of its HTTP client
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{repo_id} is not a folder, and the Hugging Face hub did not provide it ({reason}); expected a folder "
            "written by `python train.py` or the hub id 'owner/name' of a predictor"
        ) from None


def upload_predictor(
    forecaster: "NeuralForecaster", repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads weights and configuration of a predictor; returns the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="switchcast")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_predictor(Path(folder), forecaster)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the predictor"))
