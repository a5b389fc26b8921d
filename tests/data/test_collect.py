"""Collecting: real model folder, real text; interrupted, repeated, and with every kind of wrong input."""

import json
from pathlib import Path

import pytest

import data.collect
from data.collect import collect
from data.store import open_trace
from data.traffic import Traffic
from tests.conftest import TEXTS

TRAFFIC = Traffic(batches=5, smallest=2, largest=4, length=32)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(TEXTS * 3) + "\n\n")
    return str(path)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_trace_resumes_to_the_same_bytes(switch_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(data.collect, "SHARD_BATCHES", 2)
    collect(str(switch_folder), tmp_path / "whole", text, traffic=TRAFFIC)
    real, calls = data.collect.trace_batch, []

    def interrupted(*args):
        calls.append(args[0].number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(data.collect, "trace_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(str(switch_folder), tmp_path / "cut", text, traffic=TRAFFIC)
    assert not (tmp_path / "cut").exists()
    collect(str(switch_folder), tmp_path / "cut", text, traffic=TRAFFIC)
    assert calls == [0, 1, 2, 3, 2, 3, 4], "the first whole shard is kept, the cut one done again"
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists()


def test_the_same_request_is_reused_and_another_refused(switch_folder, text, tmp_path, capsys):
    out = tmp_path / "trace"
    collect(str(switch_folder), out, text, traffic=TRAFFIC)
    before = shards(out)
    collect(str(switch_folder), out, text, traffic=TRAFFIC)
    assert "Reusing the trace" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds another trace \(decode differ\)"):
        collect(str(switch_folder), out, text, decode="none", traffic=TRAFFIC)
    assert shards(out) == before


def test_without_decoder_its_layers_have_no_load(switch_folder, text, tmp_path):
    collect(str(switch_folder), tmp_path / "trace", text, decode="none", traffic=TRAFFIC)
    loads = open_trace(tmp_path / "trace").loads()
    assert loads.shape == (5, 2, 8)
    assert loads[:, 0].sum() > 0
    assert loads[:, 1].sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["--model", "{tmp}/t5"], "is a t5 model; expected switch_transformers"),
        (["--model", "{tmp}/cut"], "could not be loaded"),
        (["--text", "{tmp}/missing.txt"], "missing.txt does not exist"),
        (["--text", "{tmp}/blank.txt"], "the text has no usable line"),
        (["--text", "{tmp}/damaged.parquet"], "no text could be read from"),
        (["--traffic.batches", "0"], "batches is 0; at least 1 is needed"),
        (["--traffic.smallest", "9", "--traffic.largest", "3"], "9 to 3 are no range"),
        (["--colour", "red"], "colour"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(
    options, message, switch_folder, text, tmp_path, monkeypatch, capsys
):
    (tmp_path / "blank.txt").write_text("\n \n")
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
