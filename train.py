"""Trains a predictor of next-batch expert load and exports it as a folder that the runtime loads.

    python train.py                                        # the bundled model, offline, configs/default.yaml
    python train.py --config configs/smoke.yaml            # some seconds, to see the whole path
    python train.py --ckpt_path last                       # resumes an interrupted run

Options that most runs need:
    --predictor FOLDER       where the predictor is written; its checkpoints and log go to FOLDER.run
    --overwrite              replaces a predictor in that folder
    --data.trace FOLDER      the router trace to learn from; collected first where there is none
    --data.model MODEL       the model of the trace: a hub id or a local folder
    --trainer.max_epochs N   passes over the training batches
    --config FILE            settings from a file, such as configs/paper.yaml; options after it win
    --ckpt_path last         resumes the run of this predictor where it was interrupted

In a pipe, the last line of stdout is one JSON document; everything else goes to stderr and to FOLDER.run/train.log.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from data.arrays import IntArray
from data.cli import OneLine, print_json, user_errors
from data.datamodule import RouterTraceModule
from data.models.layout import MoELayout
from data.models.weights import BUNDLED
from data.progress import track
from data.shell import typed
from predictor.adaptive import AdaptiveForecaster
from predictor.baselines.history import FREE
from predictor.baselines.token_table import TokenTable
from predictor.checkpoint import load_adaptive, save_predictor, save_state
from predictor.choice import VALIDATION, loses
from predictor.evaluation.comparison import compare_forecasters, rivals
from predictor.evaluation.report import details, summarise, write_report
from predictor.evaluation.segments import segment_errors
from predictor.evaluation.tables import REDUNDANT
from predictor.forecast import LoadForecast
from predictor.training.calibration import calibrate_spread
from predictor.training.export import check_target, git_revision, model_card, predictor_folder, provenance
from predictor.training.module import ForecasterModule
from predictor.training.result_table import result_table
from predictor.training.run_folder import RunFolder
from predictor.training.run_log import RunLog
from predictor.training.validation import load_errors
from predictor.training.wandb_logging import BaselineCurve, name_run, track_results, track_settings
from runtime.balancing.balancer import Balancer
from runtime.balancing.plan import contiguous_homes
from runtime.balancing.scenarios import RECENT
from runtime.balancing.split import mean_balancedness, split_load

DEFAULTS = Path(__file__).parent / "configs" / "default.yaml"
DEVICES = 8
log = logging.getLogger(__name__)


class TrainParser(OneLine, LightningArgumentParser):
    """Lightning's parser; settings are checked for their groups, and help begins with what most runs need."""

    def parse_args(self, *args: Any, **settings: Any) -> Any:
        """Parses, and refuses a group of settings that is something else."""
        config = super().parse_args(*args, **settings)
        for group in ("trainer", "model", "data"):
            if not isinstance(config[group], Namespace):
                raise ValueError(f"{group} is {config[group]!r}, expected settings such as those in {DEFAULTS}")
        return config

    def format_help(self, *args: Any) -> str:
        """This module's docstring, then all options."""
        return f"{__doc__}\nAll options:\n{super().format_help(*args)}"


class TrainCLI(LightningCLI):
    """LightningCLI with the options that belong neither to the trainer nor to model or data."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer, without callbacks that cannot do anything under its settings and would refuse them."""
        idle: tuple[type[Callback], ...] = ()
        if config.get("logger") is False:
            idle += (LearningRateMonitor,)
        if config.get("enable_checkpointing") is False:
            idle += (ModelCheckpoint,)
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"] = [callback for callback in given if not isinstance(callback, idle)]
        return super()._instantiate_trainer(config, callbacks)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds --predictor, --overwrite and --ckpt_path."""
        parser.add_argument("--predictor", type=Path, help="folder the trained predictor is written to")
        parser.add_argument("--overwrite", action=ActionYesNo, nargs="?", help="replace a predictor in that folder")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume, or 'last'")


def balancedness_of(layout: MoELayout, redundant: int) -> Callable[[LoadForecast, IntArray, IntArray], float]:
    """The balancedness of batch after batch, from its forecast, its load `[L, E]` and the loads before it."""
    homes = contiguous_homes(layout.num_layers, layout.num_experts)
    balancer = Balancer(DEVICES, redundant, homes=homes)

    def of_batch(forecast: LoadForecast, load: IntArray, past: IntArray) -> float:
        plan = balancer.plan_for(forecast, past[-RECENT:])
        return mean_balancedness(split_load(load, plan))

    return of_batch


def train(cli: TrainCLI, run_log: RunLog) -> dict[str, Any] | None:
    """Fits, tests the best checkpoint, exports, reports; returns the document for a pipe, on the main process only."""
    started, folder, config = time.perf_counter(), Path(cli.config["predictor"]), cli.config
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    trial = config["trainer"]["fast_dev_run"]
    if not trial:
        check_target(folder, config["overwrite"])
    run = RunFolder(folder, trainer)
    with run.alone(), run.interruptible():
        checkpoint, wandb_run = run.checkpoint(config["ckpt_path"], model)
        run_log.write_to(run.log)
        name_run(trainer, folder, model.architecture, wandb_run)
        address = track_settings(trainer, config.as_dict() | {"git_revision": git_revision()})
        log.info("training; checkpoints and log are in %s%s", run.path, f", curves at {address}" * bool(address))
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if not trainer.global_step:
            raise ValueError("the run took no training step; raise --trainer.max_epochs or --trainer.max_steps")
        if trial:
            log.info("fast_dev_run: the batches passed; no predictor is written")
        if trial or not trainer.is_global_zero:
            return None
        line = export(cli, folder)
    return line | {"seconds": round(time.perf_counter() - started, 1)}


def export(cli: TrainCLI, folder: Path) -> dict[str, Any]:
    """Calibrates and scores the best network, and writes the predictor folder."""
    model, data = cli.model, cli.datamodule
    model.load_best()
    about: dict[str, Any] = {"provenance": provenance(model.seconds, model.cpu_seconds)}
    about["trained_on"] = data.trace.trained_on
    learned = model.forecaster()
    learned.spread = calibrate_spread(learned, track(data.samples("val"), "Calibrating"))
    adaptive = AdaptiveForecaster(learned, *learned.shape)
    errors = load_errors([adaptive, *FREE.values()], track(data.samples("val"), "Validating"), data.layout)
    about[VALIDATION] = {name: round(error, 4) for name, error in errors.items()}
    state = adaptive.state()  # what the folder begins with: without the test batches
    divides = data.layout.num_experts % DEVICES == 0
    replicators = {count: partial(balancedness_of, data.layout, count) for count in REDUNDANT if divides}
    others, count = rivals(data), data.splits.count("test")
    ladder = compare_forecasters(
        [*others, learned, adaptive], data, replicators, partial(track, description="Testing", total=count)
    )
    about["metrics"] = details(ladder)
    table = next(rival for rival in others if isinstance(rival, TokenTable))
    about["segments"] = segment_errors(
        [table, learned], data, partial(track, description="Testing segments", total=count)
    )
    with predictor_folder(folder, cli.config["overwrite"]) as new:
        save_predictor(new, learned, about)
        save_state(new, state)
        (new / "run.yaml").write_text(settings(cli))
        (new / "README.md").write_text(model_card(learned, about["metrics"], about["provenance"], errors))
        write_report(new, f"Expert load of {data.layout.model_id}", ladder, data.layout.layer_names)
        load_adaptive(new, data.layout)
    layout = data.layout
    host = "" if layout.model_id == BUNDLED else f" --model {layout.model_id}"
    host += f" --revision {layout.revision}" if layout.revision else ""
    following = f"runtime.infer{host}" if layout.d_model else f"runtime.simulate {data.path}"
    print(f"\n{result_table(about['metrics'])}")
    if sentence := loses(errors):
        print(f"Warning: {sentence}; those forecast in its place unless --forecast adaptive is given")
    print(f"More: {folder / 'report.html'}, {typed(f'python -m predictor.show {folder}')}")
    print(f"Next: {typed(f'python -m {following} --predictor {folder}')}")
    track_results(cli.trainer, ladder, layout.layer_names, folder, errors)
    line = {"predictor": str(folder), "trace": str(data.path)}
    return line | {"validation": about[VALIDATION], "test": summarise(ladder)}


def settings(cli: TrainCLI) -> str:
    """The resolved configuration as YAML; `--config` with it repeats the run."""
    config = cli.config.clone()
    for once in ("overwrite", "ckpt_path"):
        config.pop(once)
    return str(cli.parser.dump(config))


def command_line(words: list[str] | None = None) -> TrainCLI:
    """Trainer, model and data of some command-line words, by default those of this process."""
    return TrainCLI(
        ForecasterModule, RouterTraceModule, run=False, seed_everything_default=0, save_config_callback=None,
        auto_configure_optimizers=False, parser_class=TrainParser, trainer_defaults={"callbacks": [BaselineCurve()]},
        parser_kwargs={"default_config_files": [str(DEFAULTS)], "usage": "python train.py [options]"}, args=words,
    )  # fmt: skip


@contextmanager
def refusals_of_lightning() -> Iterator[None]:
    """Turns what Lightning raises on settings that it cannot follow into ValueError."""
    try:
        yield
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(str(error)) from None


def main() -> None:
    """Command line: only --help and the document for a pipe go to stdout."""
    for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):  # nothing of W&B's outside outputs/
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(Path("outputs/wandb").absolute()))
    os.environ |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    with user_errors("run the same command again"), RunLog() as run_log, refusals_of_lightning():
        cli = command_line()
        with redirect_stdout(sys.stderr):
            line = train(cli, run_log)
        if line is not None:
            print_json(line)


if __name__ == "__main__":
    main()
