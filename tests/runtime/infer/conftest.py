"""What several tests of the command share."""

from pathlib import Path

import pytest

from tests.helpers.predictors import untrained


@pytest.fixture
def predictor(switch_folder, tmp_path) -> Path:
    """An untrained predictor of the random model."""
    return untrained(switch_folder, tmp_path / "predictor")
