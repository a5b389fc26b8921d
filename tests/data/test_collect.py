"""Collecting a trace: resumed, reused, on two ranks, and refused on wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

import data.collect
from data.collect import collect
from data.files import held
from data.models.model import load_model
from data.text.batching import BatchingConfig, text_stream
from data.text.source import TextSource
from data.traces.store import open_trace
from data.traces.tracer import Tracer, download
from tests.conftest import TEXTS

BATCHING = BatchingConfig(batches=5, smallest=2, largest=4, length=32)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(TEXTS * 3) + "\n\n")
    return str(path)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_trace_resumes_to_the_same_bytes(switch_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data.collect, "SHARD_BATCHES", 2)
    collect(str(switch_folder), tmp_path / "whole", text, batching=BATCHING)
    real, calls = Tracer.trace, []

    def interrupted(self, batch):
        calls.append(batch.number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Tracer, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(str(switch_folder), tmp_path / "cut", text, batching=BATCHING)
    assert not (tmp_path / "cut").exists()
    collect(str(switch_folder), tmp_path / "cut", text, batching=BATCHING)
    assert calls == [0, 1, 2, 3, 2, 3, 4], "the first whole shard is kept, the cut one done again"
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_the_same_request_is_reused_and_another_refused(switch_folder, text, tmp_path, capsys):
    out = tmp_path / "trace"
    collect(str(switch_folder), out, text, batching=BATCHING)
    before = shards(out)
    collect(str(switch_folder), out, text, batching=BATCHING)
    assert "Reusing the trace" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds another trace \(different decode\)"):
        collect(str(switch_folder), out, text, decode="none", batching=BATCHING)
    assert shards(out) == before


def test_a_trace_of_text_that_has_changed_is_refused(switch_folder, text, tmp_path, capsys):
    out = tmp_path / "trace"
    collect(str(switch_folder), out, text, batching=BATCHING)
    before, old = shards(out), Path(text).read_text()
    Path(text).write_text(old.replace("expert", "export"))
    with pytest.raises(ValueError, match=r"holds another trace \(different content of the text\); name another --out"):
        collect(str(switch_folder), out, text, batching=BATCHING)
    assert shards(out) == before
    Path(text).write_text(old)
    about = json.loads((out / "trace.json").read_text())
    del about["text_files"]  # as in traces of earlier versions
    (out / "trace.json").write_text(json.dumps(about))
    capsys.readouterr()
    collect(str(switch_folder), out, text, batching=BATCHING)
    assert "whether its text has changed since is not known" in " ".join(capsys.readouterr().err.split())


def test_a_trace_of_a_hub_data_set_is_reused_without_the_hub(switch_folder, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 3))
    builder = datasets.load_dataset_builder("json", data_files=str(rows), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *names: builder)
    stored = collect(str(switch_folder), tmp_path / "trace", "owner/name", decode="none", batching=BATCHING)
    assert stored.about["text_files"] == {"owner/name": builder.hash}

    def offline(*names):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    collect(str(switch_folder), tmp_path / "trace", "owner/name", decode="none", batching=BATCHING)
    assert "whether its text has changed since is not known" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="no text could be read from owner/name: the hub cannot be reached"):
        collect(str(switch_folder), tmp_path / "other", "owner/name", decode="none", batching=BATCHING)


def test_an_interrupted_trace_is_not_resumed_with_other_text(switch_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data.collect, "SHARD_BATCHES", 2)
    real = Tracer.trace

    def interrupted(self, batch):
        if batch.number == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Tracer, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(str(switch_folder), tmp_path / "cut", text, batching=BATCHING)
    monkeypatch.setattr(Tracer, "trace", real)
    Path(text).write_text(Path(text).read_text().replace("expert", "export"))
    with pytest.raises(
        ValueError, match=r"cut.partial holds a trace that was interrupted \(different content of the te"
    ):
        collect(str(switch_folder), tmp_path / "cut", text, batching=BATCHING)
    assert (tmp_path / "cut.partial" / "shard-00000.json").exists()
    assert not (tmp_path / "cut").exists()


def test_a_trace_says_where_its_held_out_documents_begin(switch_folder, text, tmp_path):
    batching = BatchingConfig(batches=8, smallest=2, largest=2, length=100)  # a text is one sequence
    stored = collect(str(switch_folder), tmp_path / "trace", text, batching=batching)
    first = stored.splits.index("test")
    assert stored.about["held_out_from"] == 2 * first
    assert stored.trained_on.keys() == {"text", "text_column", "text_files", "batching", "held_out_from"}


def test_without_decoder_its_layers_have_no_load(switch_folder, text, tmp_path):
    collect(str(switch_folder), tmp_path / "trace", text, decode="none", batching=BATCHING)
    loads = open_trace(tmp_path / "trace").loads()
    assert loads.shape == (5, 2, 8)
    assert loads[:, 0].sum() > 0
    assert loads[:, 1].sum() == 0


def test_generating_logs_every_step_of_every_unfinished_sequence(switch_folder, text, tmp_path):
    collect(str(switch_folder), tmp_path / "trace", text, decode="generate", batching=BATCHING, max_new_tokens=5)
    stored = open_trace(tmp_path / "trace")
    trace = next(stored.traces())
    switch = load_model(str(switch_folder))
    written = switch.model.generate(
        input_ids=trace.tokens.input_ids, attention_mask=trace.tokens.mask.long(), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(trace.decoder_tokens.input_ids, written[:, :-1])
    logged = (trace.decoder_experts >= 0).sum((0, 1, 3))
    assert torch.equal(logged, trace.decoder_tokens.mask.sum(0))
    assert trace.load(stored.layout)[1].sum() == logged.sum(), "a step alone never drops a token"


def test_two_ranks_write_the_same_trace_as_one(switch_folder, text, tmp_path):
    settings = ["--model", str(switch_folder), "--text", text, "--decode", "none", "--batching.batches", "40"]
    settings += ["--batching.smallest", "1", "--batching.largest", "1", "--batching.length", "32"]
    module = ["-m", "data.collect", *settings, "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *module, str(tmp_path / "one")], check=True, capture_output=True, env=environment)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    done = subprocess.run(
        [*torchrun, *module, str(tmp_path / "two")], check=True, capture_output=True, text=True, env=environment
    )
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.parquet"))) == 2
    assert json.loads(done.stdout.splitlines()[-1])["batches"] == 33


def test_likeliest_experts_are_logged_beside_the_same_trace(switch_folder, text, tmp_path):
    plain = collect(str(switch_folder), tmp_path / "plain", text, batching=BATCHING)
    more = collect(str(switch_folder), tmp_path / "more", text, batching=BATCHING, top=2)
    for one, other in zip(plain.traces(), more.traces(), strict=True):
        assert one.top_experts is None
        assert torch.equal(one.experts, other.experts)
        assert other.top_experts.shape == (*other.experts.shape[:3], 2)
        real = other.tokens.mask
        assert torch.equal(other.top_experts[..., 0][:, real], other.experts[..., 0][:, real])
    assert "top" not in plain.about


@pytest.mark.parametrize("decode", ["teacher", "generate"])
def test_bfloat16_routes_are_those_of_the_model_in_bfloat16(switch_folder, text, tmp_path, decode):
    settings = {"decode": decode, "batching": BATCHING, "max_new_tokens": 5, "dtype": "bfloat16", "top": 2}
    stored = collect(str(switch_folder), tmp_path / "trace", text, **settings, device="cpu")
    assert stored.about["dtype"] == "bfloat16"
    assert "device" not in stored.about, "the CPU is the default of the format"
    switch = load_model(str(switch_folder), dtype="bfloat16")
    for trace in stored.traces():
        with torch.no_grad():
            output = switch.model(
                input_ids=trace.tokens.input_ids, attention_mask=trace.tokens.mask.long(),
                decoder_input_ids=trace.decoder_tokens.input_ids, output_router_logits=True,
            )  # fmt: skip
        logits = next(found for found in output.encoder_router_logits if torch.is_tensor(found) and found.dim() == 3)
        share = logits.softmax(-1).bfloat16()
        real = trace.tokens.mask
        assert torch.equal(trace.experts[0][real][:, 0].long(), share.argmax(-1)[real])
        probability = trace.top_probabilities[0][real]
        assert torch.equal(probability, share.topk(2, -1).values[real].half())
        assert (trace.decoder_experts[0][trace.decoder_tokens.mask] >= 0).all()
    with pytest.raises(ValueError, match=r"different dtype"):
        collect(str(switch_folder), tmp_path / "trace", text, **settings | {"dtype": "float32"})


def test_a_trace_of_another_device_is_reused(switch_folder, text, tmp_path, capsys):
    out = tmp_path / "trace"
    collect(str(switch_folder), out, text, batching=BATCHING)
    about = json.loads((out / "trace.json").read_text())
    (out / "trace.json").write_text(json.dumps(about | {"device": "cuda"}))
    assert collect(str(switch_folder), out, text, batching=BATCHING).about["device"] == "cuda"
    assert "Reusing the trace" in capsys.readouterr().err


def test_routes_are_downloaded_in_one_piece(monkeypatch):
    copies, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.numel()) or real(tensor))
    routes = torch.arange(12, dtype=torch.int16).view(3, 4)
    given = [routes.T, torch.rand(2, 5).half(), torch.zeros(0, 3, dtype=torch.int16)]
    found = download(given)
    assert copies == [22]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, given, strict=True))
    assert download([]) == []


def test_a_token_budget_bounds_positions_and_keeps_the_order(switch_folder, text, tmp_path):
    whole, cut = (
        [
            row
            for batch in text_stream(
                TextSource(text).documents(), load_model(str(switch_folder)).tokenizer, "none", batching
            )
            for row in batch.sources
        ]
        for batching in (BatchingConfig(batches=50, length=32), BatchingConfig(batches=50, length=32, token_budget=70))
    )
    assert [row.tolist() for row in cut] == [row.tolist() for row in whole]
    for batch in text_stream(
        TextSource(text).documents(),
        load_model(str(switch_folder)).tokenizer,
        "none",
        BatchingConfig(batches=50, length=32, token_budget=70),
    ):
        assert len(batch.sources) * max(map(len, batch.sources)) <= 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["--model", "{tmp}/t5"], "is a t5 model; expected switch_transformers"),
        (["--model", "{tmp}/cut"], "could not be loaded"),
        (["--text", "{tmp}/missing.txt"], "missing.txt does not exist"),
        (
            ["--text", "{tmp}/blank.txt"],
            "blank.txt gives no batch (no documents); expected a document of at least 8 tokens",
        ),
        (["--text", "{tmp}/damaged.parquet"], "damaged.parquet cannot be read as Parquet"),
        (["--text-column", "body", "--text", "{tmp}/rows.csv"], "has no column 'body'; name one of its columns: 'id'"),
        (["--batching.batches", "0"], "batches is 0; at least 1 is needed"),
        (["--batching.token_budget", "20"], "token_budget 20 holds no sequence of 128 tokens"),
        (["--batching.smallest", "9", "--batching.largest", "3"], "9 to 3 are not a range"),
        (["--colour", "red"], "colour"),
        (["--dtype", "float16"], "float16"),
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda"], "device is cuda, and of CUDA devices torch finds none; use --device cpu"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(
    options, message, switch_folder, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "rows.csv").write_text("id,content\n1,some words\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1nonsense")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "cut").mkdir()
    for file in switch_folder.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: 5000 if "safetensors" in file.name else None])
    given = {"--model": str(switch_folder), "--text": text, "--out": str(tmp_path / "out")}
    given |= dict(zip(options[::2], [option.format(tmp=tmp_path) for option in options[1::2]], strict=True))
    monkeypatch.setattr("sys.argv", ["collect", *[word for pair in given.items() for word in pair]])
    with pytest.raises(SystemExit) as stop:
        data.collect.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_collect_one_trace(switch_folder, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(TEXTS))
    text = str(tmp_path / "words.txt")
    with held(tmp_path / "t.partial"), pytest.raises(ValueError, match=r"another process is writing to .*t\.partial"):
        collect(str(switch_folder), tmp_path / "t", text, batching=BATCHING)
    assert collect(str(switch_folder), tmp_path / "t", text, batching=BATCHING).num_batches
