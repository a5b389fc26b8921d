"""The command that deploys: its contract on a real model folder and real text, and a user's mistakes."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtime.infer.__main__
from data.files import sha256
from tests.conftest import TEXTS, small_switch
from tests.helpers.predictors import untrained
from tests.helpers.small_qwen3 import write_qwen3
from tests.helpers.wandb_file import records

ROOT = Path(__file__).parents[3]
MS = {"forecast", "plan", "move", "compute", "slowest_device", "waited", "exposed"}


@pytest.fixture
def command(switch_folder, predictor, tmp_path, monkeypatch, capsys):
    """Runs the command; returns what it wrote to stdout and stderr."""
    text = tmp_path / "words.txt"
    text.write_text("\n".join(TEXTS * 2))

    def call(**changes):
        options = {"model": switch_folder, "predictor": predictor, "text": text, "devices": 4, "redundant": 4,
                   "batches": 5, "batching.smallest": 3, "batching.largest": 3, "out": tmp_path / "out"}  # fmt: skip
        words = [word for name, value in (options | changes).items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["infer", *words])
        runtime.infer.__main__.main()
        return capsys.readouterr()

    return call


def test_contract(command, tmp_path):
    shown = command(**{"expert-overhead-tokens": "auto"}).out
    assert "Outputs equal the plain model's" in shown
    assert "Balancedness, mean of 5 batches (" in shown
    assert [line.split()[1] for line in shown.splitlines() if "█" in line] == ["no", "last", "adaptive", "oracle"]
    assert len(shown.splitlines()) <= 19  # two of them may be wrapped paths
    report = json.loads(shown.splitlines()[-1])
    assert report["batches"] == 5
    assert report["tokens"] > 0
    assert 0 <= report["expert_overhead_tokens"] < 64
    assert report["max_logit_difference"] <= 1e-5
    assert report["same_argmax"] == 1.0
    assert set(report["balancedness"]) == {"contiguous", "last", "replicated", "oracle"}
    assert report["balancedness"]["contiguous"] < report["balancedness"]["oracle"]
    assert 0 < report["load_tv"] < 1
    assert report["bytes"] == report["moves"] * 2 * 32 * 48 * 4
    assert set(report["ms"]) == MS
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["each_batch"]) == 5
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r'src="(?!data:)', page) == []  # nothing from elsewhere
    assert page.count("<img alt=") == page.count('src="data:image/png;base64,') >= 3
    for name in ("balancedness", "replicas", "times"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert f"were balanced to {report['balancedness']['replicated']:.3f}" in page


def test_a_decoder_only_model_is_balanced_and_unchanged(command, switch_folder, tmp_path):
    model = write_qwen3(tmp_path / "qwen3", switch_folder)
    options = {"model": model, "predictor": untrained(model, tmp_path / "its")}
    shown = command(**options).out
    assert "Outputs equal the plain model's" in shown
    report = json.loads(shown.splitlines()[-1])
    assert report["max_logit_difference"] <= 1e-5
    assert report["same_argmax"] == 1.0
    assert report["moves"] > 0
    assert report["bytes"] == report["moves"] * 3 * 16 * 12 * 4, "a gate, and two more matrices in float32"
    assert [row["layer"] for row in report["layers"]] == ["decoder_1", "decoder_3"]
    within = command(**options | {"devices": 1, "redundant": 0, "device-memory": "2MiB"}).out
    assert json.loads(within.splitlines()[-1])["max_logit_difference"] <= 1e-5


def test_a_predictor_of_another_family_is_refused(command, switch_folder, predictor, tmp_path, capsys):
    model = write_qwen3(tmp_path / "qwen3", switch_folder)
    with pytest.raises(SystemExit) as ended:
        command(model=model, predictor=predictor)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert ended.value.code == 2
    assert "predictor" in line
    assert "qwen3" in line


def test_metrics_agree_with_the_report(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes = {"metrics-port": 0, "metrics-file": tmp_path / "metrics.jsonl", "wandb": "true"}
    said = command(**changes)
    report = json.loads(said.out.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == report["batches"]
    assert sum(layer["moves"] for line in lines for layer in line["layers"]) == report["moves"]
    assert sum(layer["bytes"] for line in lines for layer in line["layers"]) == report["bytes"]
    balance = [layer["balancedness"] for line in lines for layer in line["layers"]]
    assert sum(balance) / len(balance) == pytest.approx(report["balancedness"]["replicated"])
    errors = [line["load_tv"] for line in lines if line["load_tv"] is not None]
    assert sum(errors) / len(errors) == pytest.approx(report["load_tv"])
    assert {line["source"] for line in lines} <= {"adaptive", "none"}
    assert [row["layer"] for row in report["layers"]] == ["encoder_1", "decoder_1"]
    assert sum(row["moves"] for row in report["layers"]) == report["moves"]
    assert re.search(r"metrics: http://localhost:\d+/metrics", said.err)
    assert len(list((tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"))) == 1


def overflowing(predictor: Path, place: Path) -> Path:
    """The predictor with finite weights so large that every forecast is NaN."""
    shutil.copytree(predictor, place)
    weights = load_file(place / "model.safetensors")
    weights["encoder_heads.weight"].fill_(3e38)
    save_file(weights, place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    config["weights_sha256"] = sha256(place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_working_predictor_is_reported_as_such(command, tmp_path):
    said = command()
    report = json.loads(said.out.splitlines()[-1])
    health = report["forecasts"]
    assert set(health) == {"by", "used", "late", "replaced", "reasons"}
    assert health["used"] + health["late"] == report["batches"]
    assert (health["replaced"], health["reasons"]) == (0, {})
    assert f"Forecasts (adaptive): {health['used']} used, {health['late']} late, 0 replaced" in said.out
    assert "replaced" not in said.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["forecasts"] == health
    assert "Forecasts" not in command(predictor="null").out


def test_past_loads_forecast_where_they_are_asked_for_or_did_better(command, predictor, tmp_path, caplog):
    def by(**changes):
        return json.loads(command(**changes).out.splitlines()[-1])["forecasts"]["by"]

    assert by(predictor="null", forecast="last") == "last"
    assert by(forecast="none") == "none"
    losing = shutil.copytree(predictor, tmp_path / "losing")
    config = json.loads((losing / "config.json").read_text())
    config["validation"] = {"adaptive": 0.3, "last": 0.2, "ema": 0.25}
    (losing / "config.json").write_text(json.dumps(config))
    assert by(predictor=losing) == "last"
    assert "not better than past loads: load error 0.300, last 0.200; last forecasts instead" in caplog.text
    assert by(predictor=losing, forecast="adaptive") == "adaptive"


def test_a_predictor_that_never_works_is_no_success(command, predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    broken = overflowing(predictor, tmp_path / "broken")
    changes = {"predictor": broken, "metrics-file": tmp_path / "metrics.jsonl", "wandb": "true"}
    with pytest.raises(SystemExit) as stop:
        command(**changes)
    assert stop.value.code == 1
    said = capsys.readouterr()
    report = json.loads(said.out.splitlines()[-1])
    health = report["forecasts"]
    assert health["used"] == 0
    assert 5 - health["late"] <= health["replaced"] <= 5
    assert [reason.partition(":")[0] for reason in health["reasons"]] == ["ValueError"]
    assert sum(health["reasons"].values()) == health["replaced"]
    assert report["same_argmax"] == 1.0, "outputs do not depend on forecasts"
    assert f"Forecasts (adaptive): 0 used, {health['late']} late, {health['replaced']} replaced" in said.out
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    for part in (f"replaced {health['replaced']} times", "NaN, infinite", f"train {broken} again", "--allow-fallback"):
        assert part in error
    assert json.loads((tmp_path / "out" / "report.json").read_text())["forecasts"] == health
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {reason for line in lines for reason in line["fallbacks"]} == set(health["reasons"])
    run = next((tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"))
    items = [item for record in records(run) for item in record.history.item]
    logged = [json.loads(item.value_json) for item in items if "fallback_reason" in (item.key, *item.nested_key)]
    assert set(logged) == set(health["reasons"])


def test_fallbacks_can_be_allowed(command, predictor, tmp_path):
    said = command(**{"predictor": overflowing(predictor, tmp_path / "broken"), "allow-fallback": "true"})
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning: forecasts were replaced")]
    assert "--allow-fallback" not in warning
    assert json.loads(said.out.splitlines()[-1])["forecasts"]["replaced"] > 0


def test_bfloat16_counts_routes_and_tokens_that_differ(command):
    shown = command(dtype="bfloat16").out
    report = json.loads(shown.splitlines()[-1])
    assert report["dtype"] == "bfloat16"
    assert report["routes"] == report["tokens"], "one MoE layer in each stack: each token has one route"
    assert report["flipped_routes"] <= 0.01 * report["routes"]
    assert report["differing_tokens"] == round(report["differing_tokens"])
    assert "Outputs equal the plain model's up to bfloat16 rounding" in shown
    assert f"of {report['routes']:,} routes and {report['differing_tokens']} likeliest tokens differ" in shown


def cut(folder: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(folder, tmp_path / "cut")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    return copy


def other_model(folder: Path, tmp_path: Path) -> Path:
    small_switch(seed=1).save_pretrained(tmp_path / "other")
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    return tmp_path / "other"


def not_finite(folder: Path, place: Path) -> Path:
    """The model with experts whose weights are no numbers."""
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    for name in weights:
        if ".experts." in name:
            weights[name][7] = torch.nan
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


def test_mistakes_end_with_one_line_and_exit_code_2(command, switch_folder, predictor, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    taken = socket.create_server(("", 0))
    port = taken.getsockname()[1]
    mistakes = [
        ({"model": tmp_path / "nowhere"}, "nowhere is not a folder"),
        ({"model": cut(switch_folder, tmp_path / "m")}, "could not be loaded"),
        ({"model": other_model(switch_folder, tmp_path)}, "was trained for"),
        ({"predictor": tmp_path / "nowhere"}, "is not a folder; expected a predictor"),
        ({"predictor": cut(predictor, tmp_path / "p")}, "cut short"),
        ({"text": tmp_path / "blank.txt"}, "gives no batch (no documents); expected a document of at least 8 tokens"),
        ({"batches": 0}, "batches is 0"),
        ({"devices": 5}, "8 experts and 4 redundant experts do not divide over 5 devices"),
        ({"redundant": 6}, "6 redundant experts do not divide over 4 devices"),
        ({"redundancy": 6}, "redundancy"),
        ({"redundant": 4000}, "4000 redundant experts are more than a copy of each of 8 experts on every one of 4"),
        ({"expert-overhead-tokens": -1}, "expert_overhead_tokens is -1, expected a whole number, 0 or more"),
        ({"dtype": "float16"}, "float16"),
        ({"device": "tpu"}, "tpu"),
        *(
            []
            if torch.cuda.is_available()
            else [({"device": "cuda"}, "device is cuda, and of CUDA devices torch finds none; use --device cpu")]
        ),
        ({"timeout": 0}, "the timeout is 0.0 seconds"),
        ({"host-memory": "1GiB"}, "host_memory is 1GiB without device_memory"),
        ({"device-memory": "1GiB", "devices": 4}, "within a budget a process is one device"),
        ({"device-memory": "lots", "devices": 1}, "'lots' is not a number of bytes"),
        ({"out": tmp_path / "blank.txt"}, "blank.txt is a file, expected a folder"),
        ({"model": not_finite(switch_folder, tmp_path / "n")}, "are not finite"),
        ({"metrics-port": port}, f"metrics port {port} cannot be served"),
        ({"metrics-port": 70000}, "metrics port is 70000"),
        ({"metrics-file": tmp_path / "folder"}, "cannot be written"),
        ({"metrics-file": tmp_path / "new.jsonl", "model": tmp_path / "nowhere"}, "nowhere is not a folder"),
    ]
    for changes, message in mistakes:
        with pytest.raises(SystemExit) as stop:
            command(**changes)
        error = capsys.readouterr().err
        assert stop.value.code == 2, changes
        assert message in error, error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists(), changes
    taken.close()
    assert not (tmp_path / "new.jsonl").exists()
