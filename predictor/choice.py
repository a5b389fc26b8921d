"""Which forecaster serves: a trained predictor, or past loads where those did better on its validation batches.

    forecaster = open_forecaster("outputs/predictor", "auto", layout)

`train.py` records the load errors of the predictor and of two forecasters from past loads in the predictor folder.
"""

import logging
from pathlib import Path
from typing import Literal

from torch import Tensor

from data.models.layout import MoELayout
from predictor.baselines.history import FREE
from predictor.checkpoint import CONFIG, load_adaptive, load_predictor, local_folder, read_config
from predictor.forecast import Forecaster

Choice = Literal["auto", "adaptive", "learned", "last", "ema", "none"]
VALIDATION = "validation"
"""Key of config.json: forecaster -> load error on the validation batches."""
log = logging.getLogger(__name__)


def better_free(errors: dict[str, float]) -> str | None:
    """The best of the free forecasters if the predictor is not better than it; None if it is, or nothing is known.

    Args:
        errors: Load error of each forecaster, `adaptive` among them.
    """
    free = [name for name in FREE if name in errors]
    if not free or "adaptive" not in errors:
        return None
    best = min(free, key=errors.__getitem__)
    return best if errors[best] <= errors["adaptive"] else None


def loses(errors: dict[str, float]) -> str | None:
    """One sentence where the predictor is not better than past loads; None where it is."""
    if (best := better_free(errors)) is None:
        return None
    return (
        f"on the validation batches the predictor is not better than past loads: load error "
        f"{errors['adaptive']:.3f}, {best} {errors[best]:.3f}"
    )


def validation_errors(folder: Path) -> dict[str, float]:
    """Load error of each forecaster on the validation batches of a predictor; empty in folders of earlier versions.

    Raises:
        ValueError: If config.json says something else.
    """
    errors = read_config(folder).get(VALIDATION, {})
    if not isinstance(errors, dict) or not all(type(error) in (int, float) for error in errors.values()):
        raise ValueError(
            f"{folder / CONFIG}: {VALIDATION} is {errors!s:.80}, expected numbers; train the predictor again"
        )
    return errors


def open_forecaster(
    predictor: Path | str | None,
    choice: Choice,
    layout: MoELayout,
    embedding: Tensor | None = None,
    revision: str | None = None,
) -> Forecaster | None:
    """Opens a forecaster.

    Args:
        predictor: A folder that `train.py` wrote, a hub id of one, or None.
        choice: "adaptive" is the predictor, which goes on learning from the batches that run; "learned" the predictor
            as it was trained; "last" the last batch, "ema" a moving average; "none" nothing. "auto" is "adaptive", or
            the better of "last" and "ema" where the predictor was not better on its validation batches; without a
            predictor "none".
        layout: Layout of the model to forecast for.
        embedding: Its token embeddings `[V, D]`; None reads them.
        revision: Branch, tag or commit of a predictor on the hub.

    Raises:
        ValueError: If a predictor is needed and there is none, or it cannot be loaded.
    """
    if choice in FREE:
        return FREE[choice]
    if choice == "none" or (choice == "auto" and predictor is None):
        return None
    if predictor is None:
        raise ValueError(f"forecast is '{choice}' without a predictor; give a folder that train.py wrote")
    folder = local_folder(predictor, revision)
    if choice == "learned":
        return load_predictor(folder, layout, embedding)
    errors = validation_errors(folder) if choice == "auto" else {}
    if (best := better_free(errors)) is not None:
        log.warning("%s; %s forecasts instead (forecast 'adaptive' takes the predictor)", loses(errors), best)
        return FREE[best]
    return load_adaptive(folder, layout, embedding)
