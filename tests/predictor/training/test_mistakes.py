"""User errors of `train.py`: each ends with one line and exit code 2."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from data.files import sha256
from predictor.checkpoint import CONFIG, WEIGHTS
from predictor.training.export import check_target
from tests.helpers.made_up_trace import VOCABULARY, WIDTH, make_layout, time_splits, write_trace


@pytest.fixture
def refused(run, capsys):
    """The one line that a call of `train.py` ends with."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert captured.err.splitlines()[-1].startswith("error: ")
        return captured.err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (["--nonsense=1"], "unrecognized arguments: --nonsense=1; see --help"),
        (["--trainer.max_epoch=1"], "unrecognized arguments: --trainer.max_epoch=1; see --help"),
        (["--trainer.max_epoch", "1"], "unrecognized arguments: --trainer.max_epoch 1; see --help"),
        (["--over"], "unrecognized arguments: --over; see --help"),
        (["--data.batching.batche=3"], "unrecognized arguments: --data.batching.batche=3; see --help"),
        (["--model.architecture.cel=lstm"], "unrecognized arguments: --model.architecture.cel=lstm; see --help"),
        (["--trainer.logger.init_args.save_di=x"], "Option 'save_di' is not accepted"),
        (["--model.architecture.cell=rnn"], "--model.architecture.cell is 'rnn', expected 'sru' or 'lstm'"),
        (["--data.model=other/model"], "the configuration names other/model"),
        (["--data.trace=/nowhere", "--data.model=/nowhere"], "/nowhere is not a folder"),
        (["--predictor=."], ". exists and is not a predictor folder"),
        (["--ckpt_path=broken.ckpt"], "broken.ckpt is no checkpoint that can be resumed"),
        (
            ["--ckpt_path=foreign.ckpt"],
            "foreign.ckpt is no checkpoint that can be resumed: no run of train.py wrote it",
        ),
        (["--ckpt_path=last"], "outputs/smoke/predictor.run/last.ckpt does not exist; there is no run to resume"),
        (["--model.distillation_weight=1"], "the trace contains no likeliest experts to distil from"),
        (["--trainer.max_epochs=0"], "the run took no training step; raise --trainer.max_epochs"),
        (["--trainer.limit_train_batches=0"], "the run took no training step"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--model.learning_rate=1e30"], "is nan; lower --model.learning_rate"),
    ],
)
def test_settings(refused, tmp_path, mistake, says):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut short")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    assert says in refused(*mistake)


def test_a_predictor_is_not_replaced_unasked(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "mine" / name).touch()
    says = refused("--predictor=mine")
    assert "mine holds a predictor already; name another folder with --predictor, or replace it with --over" in says
    assert "mine holds a predictor already" in refused("--predictor=mine", "--ckpt_path=last")
    assert "mine holds a predictor already" in refused("--predictor=mine", "--overwrite=false")
    assert not (tmp_path / "mine.run").exists(), "nothing has begun"
    check_target(tmp_path / "mine", overwrite=True)


def test_damaged_shard_is_named(refused, tmp_path, trace):
    copy = shutil.copytree(trace, tmp_path / "copy")
    shard = sorted(copy.glob("*.parquet"))[1]
    shard.write_bytes(shard.read_bytes()[:-20])
    assert shard.name in refused(f"--data.trace={copy}")


def test_missing_values_in_a_trace(refused, tmp_path, trace):
    copy = shutil.copytree(trace, tmp_path / "copy")
    shard = sorted(copy.glob("*.parquet"))[0]
    table = pq.read_table(shard)
    holes = pa.array([[None, *row[1:]] for row in table["encoder_1"].to_pylist()], table.schema.field("encoder_1").type)
    pq.write_table(table.set_column(table.schema.get_field_index("encoder_1"), "encoder_1", holes), shard)
    about = json.loads((copy / "trace.json").read_text())
    about["shards"][0]["sha256"] = sha256(shard)
    (copy / "trace.json").write_text(json.dumps(about))
    assert f"{shard.name}: column encoder_1 has missing values" in refused(f"--data.trace={copy}")


@pytest.mark.parametrize(
    ("splits", "says"),
    [([], "has 0 batches, none of them in the train split"),
     (["train"], "has 1 batches, none of them in the val split"),
     (time_splits(6, 0, 2), "none of them in the val split")],
)  # fmt: skip
def test_too_few_batches(refused, tmp_path, layout, splits, says):
    assert says in refused(f"--data.trace={write_trace(tmp_path / 't', layout, splits)}")


@pytest.mark.parametrize(
    ("rows", "value", "says"),
    [(VOCABULARY - 5, 1.0, f"has {VOCABULARY - 5} embeddings, the trace was made with a vocabulary of {VOCABULARY}"),
     (VOCABULARY, torch.nan, "contains NaN or infinite numbers")],
)  # fmt: skip
def test_a_model_whose_embeddings_do_not_fit(refused, tmp_path, rows, value, says):
    (tmp_path / "m").mkdir()
    save_file({"shared.weight": torch.full((rows, WIDTH), value)}, tmp_path / "m" / "model.safetensors")
    folder = write_trace(tmp_path / "t", make_layout(str(tmp_path / "m")), time_splits(6, 2, 2))
    assert says in refused(f"--data.trace={folder}", f"--data.model={tmp_path / 'm'}")


def test_tokens_beyond_the_vocabulary(refused, tmp_path, layout):
    small = replace(layout, vocab_size=30)
    folder = write_trace(tmp_path / "t", small, time_splits(6, 2, 2))
    assert "its model has a vocabulary of 30; collect the trace again" in refused(f"--data.trace={folder}")


def test_a_checkpoint_of_another_run(run, refused, tmp_path, host):
    run("--trainer.max_epochs=1")
    last = "outputs/smoke/predictor.run/last.ckpt"
    says = refused("--overwrite", "--model.architecture.width=16", f"--ckpt_path={last}")
    assert "is of architecture" in says
    assert "'width': 32" in says
    assert "'width': 16" in says
    other = write_trace(tmp_path / "t", make_layout(str(host), routers="x"), time_splits(6, 2, 2))
    says = refused(f"--data.trace={other}", f"--ckpt_path={last}", "--trainer.max_epochs=2", "--overwrite")
    assert "the checkpoint is of a run for a model with fingerprint" in says
