"""What Weights & Biases gets beyond Lightning's curves: settings, trace, baselines, tables, pictures, the predictor.

Every predictor has a run of its own, named after its folder; a resumed training goes on under the same run id. Other
loggers are left alone.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from data.datamodule import RouterTraceModule
from data.errors import first_line
from data.files import sha256
from data.traces.recordings import TRACE_JSON
from predictor.baselines.history import Ema, LastBatch
from predictor.evaluation.comparison import Comparison
from predictor.evaluation.report import details, layer_rows, summarise
from predictor.evaluation.tables import CAPTIONS
from predictor.network import Architecture
from predictor.training.validation import load_errors

log = logging.getLogger(__name__)
CURVE = "val/load_tv"
INIT_S = "30"
"""Seconds that W&B is given to answer when a run begins, as an environment variable; W&B itself would take 90."""
SUMMARISED = ("load_tv", "balancedness_r16")
"""Test figures in a run's summary, by the beginning of their names."""


def wandb_logger(trainer: Trainer) -> WandbLogger | None:
    """The trainer's W&B logger; None on other processes than the first, and where there is none."""
    loggers = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
    return next(loggers, None) if trainer.is_global_zero else None


def name_run(trainer: Trainer, predictor: Path, architecture: Architecture, resumed: str | None) -> None:
    """Names the W&B run that is about to start, and gives it the id of the run that is resumed."""
    if wandb_logger(trainer) is None:
        return
    import wandb

    os.environ["WANDB_NAME"] = f"{predictor.name} {architecture.cell}-{architecture.depth}x{architecture.width}"
    if resumed:
        os.environ |= {"WANDB_RUN_ID": resumed, "WANDB_RESUME": "allow"}
    wandb.termsetup(wandb.Settings(silent=True), logging.getLogger("wandb"))  # init warns before it reads WANDB_SILENT


def track_settings(trainer: Trainer, settings: dict[str, Any]) -> str | None:
    """Logs the settings as the run's configuration; returns the address of an online run.

    Where W&B cannot be reached, the run is kept on disk instead, because a training must not depend on a connection.
    """
    if (logger := wandb_logger(trainer)) is None:
        return None
    import wandb

    os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_S)
    try:
        _ = logger.experiment
    except wandb.errors.CommError as error:
        log.warning(
            "W&B cannot be reached (%s); the run stays on disk, and `wandb sync` sends it later", first_line(error)
        )
        logger._wandb_init["mode"] = "offline"  # W&B reads its environment only once
    logger.experiment.config.update(settings, allow_val_change=True)
    return getattr(logger.experiment, "url", None)


class BaselineCurve(Callback):
    """After each validation, draws the load errors so far and those of two baselines into one chart of the W&B run.

    The run's configuration names the trace and the model by their fingerprints; online, the trace is an input artifact
    (its description, not its shards).
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.errors: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "errors": self.errors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.errors = list(state_dict["steps"]), list(state_dict["errors"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (logger := wandb_logger(trainer)) is None:
            return
        data: RouterTraceModule = trainer.datamodule  # type: ignore[attr-defined]
        run, trace = logger.experiment, data.path / TRACE_JSON
        facts = {"trace_sha256": sha256(trace), "layout_fingerprint": data.layout.fingerprint()}
        run.config.update(facts, allow_val_change=True)
        steps = [step for step, split in enumerate(data.splits) if split == "val"]
        self.baselines = load_errors([LastBatch(), Ema.fit(data.loads, steps)], data.samples("val"), data.layout)
        run.summary.update({f"reference/{CURVE}/{name}": value for name, value in self.baselines.items()})
        if not run.offline:
            import wandb

            artifact = wandb.Artifact(artifact_name(data.path), type="trace", metadata={"path": str(data.path)})
            artifact.add_file(str(trace))
            run.use_artifact(artifact)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (logger := wandb_logger(trainer)) is None or trainer.sanity_checking:
            return
        import wandb

        self.steps.append(trainer.global_step)
        self.errors.append(float(trainer.callback_metrics[CURVE]))
        lines = {"this run": self.errors} | {n: [v] * len(self.steps) for n, v in self.baselines.items()}
        title = "Load error on validation batches (lower is better)"
        chart = wandb.plot.line_series([self.steps] * len(lines), list(lines.values()), list(lines), title, "step")
        logger.experiment.log({"curves/load_tv": chart})


def artifact_name(folder: Path) -> str:
    """The name of a folder as W&B takes it: ASCII letters, digits, dashes, underscores and dots, at most 128."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name)[:128]


def track_results(
    trainer: Trainer, ladder: Comparison, layer_names: list[str], folder: Path, errors: dict[str, float]
) -> None:
    """Logs figures as summary, tables and pictures, and the predictor as output artifact; ends the run.

    Args:
        trainer: Whose W&B run it is; without one nothing is done.
        ladder: Test figures.
        layer_names: Name of each MoE layer.
        folder: The predictor's folder.
        errors: Load error of each forecaster on the validation batches, when training had ended.
    """
    if (logger := wandb_logger(trainer)) is None:
        return
    import wandb

    run = logger.experiment
    rows = [
        [stream, name, *(end for metric in CAPTIONS for end in (values.get(metric), *_ends(values, metric)))]
        for stream, forecasters in details(ladder).items()
        for name, values in forecasters.items()
    ]
    columns = [f"{metric}{end}" for metric in CAPTIONS for end in ("", "_low", "_high")]
    run.log({"tables/ladder": wandb.Table(["stream", "forecaster", *columns], rows)})
    run.log({"tables/layers": wandb.Table(["stream", "forecaster", *layer_names], layer_rows(ladder, layer_names))})
    for picture in sorted(folder.glob("*.png")):  # drawn once, for the report
        run.log({f"pictures/{picture.stem}": wandb.Image(str(picture))})
    run.summary.update({f"validation/{name}/load_tv": error for name, error in errors.items()})
    for stream, forecasters in summarise(ladder).items():
        for name, values in forecasters.items():
            chosen = {metric: value for metric, value in values.items() if metric.startswith(SUMMARISED)}
            run.summary.update({f"test/{stream}/{name}/{metric}": value for metric, value in chosen.items()})
    artifact = wandb.Artifact(artifact_name(folder), type="predictor")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=["latest", "best"])
    run.finish()


def _ends(values: dict[str, Any], metric: str) -> list[float | None]:
    """Both ends of a figure's interval."""
    return values.get(f"{metric}_interval") or [None, None]
