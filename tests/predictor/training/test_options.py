"""Options of Lightning and W&B that people use, small models, folders that move, and two runs at once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.files import held
from predictor.checkpoint import load_predictor
from predictor.training.module import one_cycle
from predictor.training.wandb_logging import artifact_name
from tests.helpers.made_up_trace import time_splits, write_trace
from tests.predictor.training.test_wandb_logging import OFFLINE


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.logger=false"],
        ["--trainer.enable_checkpointing=false"],
        ["--trainer.callbacks=null"],
        ["--trainer.limit_val_batches=0"],
        ["--trainer.check_val_every_n_epoch=5"],
        ["--trainer.max_epochs=-1", "--trainer.max_steps=3"],
        ["--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:02"],
    ],
    ids=" ".join,
)
def test_a_predictor_comes_of_it(run, options):
    assert load_predictor(run("--trainer.max_epochs=1", *options)["predictor"]).name == "learned"


def test_a_trial_of_one_batch_writes_no_predictor(run):
    with pytest.raises(IndexError):  # nothing on stdout
        run("--trainer.fast_dev_run=true")
    assert "fast_dev_run: the batches passed; no predictor is written" in run.stderr
    assert not Path("outputs/smoke/predictor").exists()


def test_a_training_without_end_keeps_its_rate():
    assert [one_cycle(step, float("inf")) for step in (0, 49, 99, 100, 10**6)] == pytest.approx([0.01, 0.5, 1, 1, 1])
    assert one_cycle(100, 100) == pytest.approx(0)


def test_a_model_with_one_moe_layer_in_each_stack(run, tmp_path, layout):
    small = replace(layout, layers=(("encoder", 1), ("decoder", 1)), modules=())
    line = run(f"--data.trace={write_trace(tmp_path / 't', small, time_splits(12, 4, 4))}")
    assert load_predictor(line["predictor"], small).shape == (2, 8)


def test_a_finished_run_that_moved_is_resumed_from_its_own_checkpoints(run, tmp_path):
    run("--trainer.max_epochs=1", "--predictor=one/p")
    shutil.move("one", "two")
    line = run("--trainer.max_epochs=1", "--predictor=two/p", "--overwrite", "--ckpt_path=last")
    assert line["predictor"] == "two/p"


def test_the_second_run_in_a_folder_is_refused(run, tmp_path, capsys):
    with held(tmp_path / "mine.run"), pytest.raises(SystemExit) as stop:
        run("--predictor=mine")
    assert stop.value.code == 2
    assert "another process is writing to mine.run; wait until it has ended" in capsys.readouterr().err
    assert run("--predictor=mine")["predictor"] == "mine"


def test_any_folder_name_becomes_one_that_wandb_takes(run):
    assert run(*OFFLINE, "--predictor=out/my größter predictor")["predictor"] == "out/my größter predictor"
    assert artifact_name(Path("out/my größter predictor")) == "my-gr--ter-predictor"
    assert len(artifact_name(Path("x" * 300))) == 128


def test_a_predictor_that_loses_says_so(run, tmp_path, layout):
    """Loads that repeat themselves exactly are forecast without error by the last batch alone."""
    repeating = write_trace(tmp_path / "t", layout, time_splits(12, 4, 4), repeating=True)
    line = run("--trainer.max_epochs=1", f"--data.trace={repeating}")
    assert line["validation"]["last"] == 0 < line["validation"]["adaptive"]
    assert "not better than past loads" in run.stderr
    assert "not better than past loads" in Path(line["predictor"], "README.md").read_text()
    assert json.loads(Path(line["predictor"], "config.json").read_text())["validation"] == line["validation"]
