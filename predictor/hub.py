"""Predictors on the Hugging Face hub: upload and download of the folder described in docs/checkpoint-format.md.

    upload_predictor("outputs/predictor", "owner/name")
    load_predictor("owner/name")             # predictor.load_predictor downloads it

huggingface_hub is imported on use, so that local folders load without it.
"""

import re
from pathlib import Path

from data.errors import first_line

FILES = ("config.json", "model.safetensors", "adaptive.safetensors", "README.md")
"""Files of a predictor folder that are on the hub."""


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
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # huggingface_hub raises its own errors and those of its HTTP client
        reason = first_line(error)
        raise ValueError(
            f"{repo_id} is not a folder, and the Hugging Face hub did not provide it ({reason}); expected a folder "
            "written by `python train.py` or the hub id 'owner/name' of a predictor"
        ) from None


def upload_predictor(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a predictor folder; `load_predictor(repo_id)` finds it there.

    Args:
        folder: Folder that `train.py` wrote.
        repo_id: Repository, "owner/name"; created if it does not exist.
        private: Whether a new repository is private; None follows the owner's default.
        token: Access token; None uses the one of `hf auth login`.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="switchcast")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    uploaded = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload the predictor"
    )
    return str(uploaded)
