"""What a run tells Weights & Biases beyond its curves; any other logger is left alone."""

import io
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from data.style import to_png
from data.traces.store import TRACE_JSON
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.report import details, figures, layer_rows, summarise
from predictor.evaluation.tables import CAPTIONS


def _wandb(trainer: Trainer) -> WandbLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


def track_settings(trainer: Trainer, settings: dict[str, Any]) -> None:
    """Logs the settings as the run's configuration."""
    if logger := _wandb(trainer):
        logger.experiment.config.update(settings, allow_val_change=True)


def track_trace(trainer: Trainer, trace: Path) -> None:
    """Names the trace as the run's input artifact, by its description, not its shards; online only."""
    logger = _wandb(trainer)
    if logger is None or logger.experiment.offline:
        return
    import wandb

    artifact = wandb.Artifact(trace.name, type="trace", metadata={"path": str(trace)})
    artifact.add_file(str(trace / TRACE_JSON))
    logger.experiment.use_artifact(artifact)


def track_results(trainer: Trainer, ladder: Comparison, layer_names: list[str], folder: Path) -> None:
    """Logs the ladder and per-layer tables, the pictures, and the predictor folder as output artifact; ends the run."""
    logger = _wandb(trainer)
    if logger is None:
        return
    import wandb
    from PIL import Image

    run = logger.experiment
    summaries = summarise(ladder)
    rows = [
        [stream, name, *(end for metric in CAPTIONS for end in (values.get(metric), *_ends(values, metric)))]
        for stream, forecasters in details(ladder).items()
        for name, values in forecasters.items()
    ]
    columns = [f"{metric}{end}" for metric in CAPTIONS for end in ("", "_low", "_high")]
    run.log({"tables/ladder": wandb.Table(["stream", "forecaster", *columns], rows)})
    run.log({"tables/layers": wandb.Table(["stream", "forecaster", *layer_names], layer_rows(ladder, layer_names))})
    for name, figure in figures(ladder, layer_names).items():
        run.log({f"pictures/{name}": wandb.Image(Image.open(io.BytesIO(to_png(figure))))})
    for stream, forecasters in summaries.items():
        run.summary.update({f"test/{stream}/{name}/load_tv": v["load_tv"] for name, v in forecasters.items()})
    artifact = wandb.Artifact(folder.name, type="predictor")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=["latest", "best"])
    run.finish()


def _ends(values: dict[str, Any], metric: str) -> list[float | None]:
    """Both ends of a figure's interval."""
    return values.get(f"{metric}_interval") or [None, None]
