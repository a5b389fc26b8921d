"""A predictor on the Hugging Face hub: `from_pretrained` and `push_to_hub` for the folder of `predictor.checkpoint`."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from predictor.checkpoint import load_predictor, save_predictor
from predictor.forecaster import NeuralForecaster


class HubForecaster(NeuralForecaster, ModelHubMixin, library_name="switchcast"):
    """A `NeuralForecaster` that knows the hub.

    `HubForecaster.from_pretrained("owner/name")` or a local folder; `.push_to_hub("owner/name")`.
    """

    @classmethod
    def of(cls, forecaster: NeuralForecaster) -> "HubForecaster":
        """The same predictor, with the hub's methods."""
        return cls(
            forecaster.layout, forecaster.network, forecaster.embedding, forecaster.spread, forecaster.familiarity
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save_predictor(save_directory, self)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **settings: Any,
    ) -> "HubForecaster":
        """Loads from a folder or the hub; `settings` go to `load_predictor`."""
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id, revision=revision, cache_dir=cache_dir, force_download=force_download,
                    local_files_only=local_files_only, token=token,
                )
            )  # fmt: skip
        return cls.of(load_predictor(folder, **settings))
