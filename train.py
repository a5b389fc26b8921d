"""Trains a predictor of next-batch expert load and leaves it in a folder that the runtime loads.

    python train.py                                        # the bundled model, offline, configs/default.yaml
    python train.py --config configs/smoke.yaml            # some seconds, for a look
    python train.py --ckpt_path last                       # go on where a run was stopped

Every setting is an option (`--help`). The last line of stdout is one JSON document; all else goes to stderr.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from data.arrays import IntArray
from data.cli import user_errors
from data.datamodule import RouterTraceModule
from data.models.layout import MoELayout
from predictor.baselines.token_table import TokenTable
from predictor.checkpoint import load_predictor, save_predictor
from predictor.evaluation.comparison import compare_forecasters, rivals
from predictor.evaluation.report import details, summarise, write_report
from predictor.evaluation.segments import segment_errors
from predictor.evaluation.tables import CAPTIONS, ladder_table
from predictor.familiarity import Familiarity
from predictor.forecast import LoadForecast
from predictor.training.calibration import calibrate_spread
from predictor.training.export import check_target, git_revision, model_card, predictor_folder, provenance
from predictor.training.module import ForecasterModule
from predictor.training.resume import checkpoint_to_resume
from predictor.training.wandb_logging import track_results, track_settings, track_trace
from runtime.balancing.balancer import Balancer
from runtime.balancing.plan import contiguous_homes
from runtime.balancing.scenarios import RECENT
from runtime.balancing.split import balancedness, split_load

DEFAULTS = Path(__file__).parent / "configs" / "default.yaml"
DEVICES = 8
REDUNDANT = {"balancedness": 16, "balancedness_8": 8}
"""The settings in which the report compares forecasters by what they are for."""


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, without the usage of a hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Hands the message to `user_errors`."""
        raise ValueError(message)


class TrainCLI(LightningCLI):
    """LightningCLI with the two paths that belong neither to the trainer nor to model or data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds --predictor and --ckpt_path."""
        parser.add_argument("--predictor", type=Path, help="folder to leave the trained predictor in")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume, or 'last'")


def balancedness_of(layout: MoELayout, redundant: int) -> Callable[[LoadForecast, IntArray, IntArray], float]:
    """The balancedness of batch after batch, from its forecast, its load `[L, E]` and the loads before it."""
    homes = contiguous_homes(layout.num_layers, layout.num_experts)
    balancer = Balancer(DEVICES, redundant, homes=homes)

    def of_batch(forecast: LoadForecast, load: IntArray, past: IntArray) -> float:
        plan = balancer.plan_for(forecast, past[-RECENT:])
        return float(balancedness(split_load(load, plan)).mean())

    return of_batch


def train(cli: TrainCLI) -> dict[str, Any] | None:
    """Fit, test on the best, export, report; returns the last line, on the main process only."""
    started, folder = time.perf_counter(), Path(cli.config["predictor"])
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    check_target(folder)
    checkpoint = checkpoint_to_resume(trainer, model, cli.config["ckpt_path"])
    track_settings(trainer, cli.config.as_dict() | {"git_revision": git_revision()})
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    track_trace(trainer, data.path)
    about: dict[str, Any] = {"provenance": provenance(model.seconds, model.cpu_seconds)}
    trainer.test(model, datamodule=data, ckpt_path="best", weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return None
    learned = model.forecaster()
    learned.spread = calibrate_spread(learned, data.samples("val"))
    learned.familiarity = Familiarity.fit(data.layout.vocab_size, data.tokens("train"), data.tokens("val"))
    divides = data.layout.num_experts % DEVICES == 0
    replicators = {name: partial(balancedness_of, data.layout, count) for name, count in REDUNDANT.items() if divides}
    others = rivals(data)
    ladder = compare_forecasters([*others, learned], data, replicators)
    about["metrics"] = details(ladder)
    table = next(rival for rival in others if isinstance(rival, TokenTable))
    about["segments"] = segment_errors([table, learned], data)
    with predictor_folder(folder) as new:
        save_predictor(new, learned, about)
        (new / "run.yaml").write_text(cli.parser.dump(cli.config))
        (new / "README.md").write_text(model_card(learned, about["metrics"], about["provenance"]))
        write_report(new, f"Expert load of {data.layout.model_id}", ladder, data.layout.layer_names)
        load_predictor(new, data.layout)
    track_results(trainer, ladder, data.layout.layer_names, folder)
    for metric in ("load_tv", "balancedness", "balancedness_8"):
        print(f"\n{CAPTIONS[metric]}\n\n{ladder_table(about['metrics'], metric)}")
    print(f"\nMore: python -m predictor.show {folder}, or open {folder / 'report.html'}")
    seconds = round(time.perf_counter() - started, 1)
    return {"predictor": str(folder), "trace": str(data.path), "seconds": seconds, "test": summarise(ladder)}


def main() -> None:
    """Command line: everything but the last line goes to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):  # nothing of W&B's outside outputs/
        os.environ.setdefault(f"WANDB_{kind}_DIR", str(Path("outputs/wandb").absolute()))
    about = (__doc__ or "").splitlines()[0]
    with user_errors():
        cli = TrainCLI(  # --help goes to stdout
            ForecasterModule, RouterTraceModule, run=False, seed_everything_default=0, save_config_callback=None,
            auto_configure_optimizers=False, parser_class=OneLineParser,
            parser_kwargs={"default_config_files": [str(DEFAULTS)], "description": about},
        )  # fmt: skip
        with redirect_stdout(sys.stderr):
            line = train(cli)
        if line is not None:
            print(json.dumps(line))


if __name__ == "__main__":
    main()
