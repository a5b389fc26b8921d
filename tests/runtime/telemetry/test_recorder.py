"""What telemetry tells agrees with what batches took, in every sink; what cannot be opened is refused."""

import dataclasses
import json
import resource
import signal
import socket
from concurrent.futures import wait
from itertools import pairwise

import numpy as np
import pytest
import wandb

from runtime.balancing.split import balancedness
from runtime.engine.engine import Engine
from runtime.telemetry.recorder import Telemetry, figures, forecast_error, over_batches
from tests.helpers.batches import batches
from tests.helpers.budgets import budget
from tests.helpers.forecasters import Broken, Noise
from tests.helpers.prometheus import scrape
from tests.helpers.wandb_file import records

LAYERS = ["encoder_1", "decoder_1"]


def run(switch, forecaster, telemetry: Telemetry, after=lambda costs: None) -> list:
    """Runs batches and tells them; calls `after` with the costs so far after each."""
    costs = []
    with telemetry, Engine(switch, forecaster, 4, 8) as engine:
        for output in engine.run(iter(batches())):
            telemetry.record(LAYERS, output.stats, engine.controller.late, engine.controller.fallbacks)
            costs.append(output.stats)
            wait([engine.controller._future] if engine.controller._future else [], 10)  # none is late
            after(costs)
    return costs


def test_a_scrape_at_any_time_gives_what_the_batches_so_far_took(switch):
    telemetry = Telemetry(port=0)

    def compare(costs):
        found = scrape(telemetry.port)
        assert sum(value for (name, *_), value in found.items() if name == "batches_total") == len(costs)
        assert found["compute_seconds_sum",] == pytest.approx(sum(cost.compute_ms for cost in costs) / 1e3)
        assert found["exposed_seconds_sum",] == pytest.approx(sum(cost.exposed_ms for cost in costs) / 1e3)
        ready = [cost for cost in costs if cost.preparation and cost.preparation.forecast]
        for layer, name in enumerate(LAYERS):
            balance = [balancedness(cost.device_load)[layer] for cost in costs]
            assert found["balancedness_sum", name] == pytest.approx(sum(balance))
            assert found["balancedness_count", name] == len(costs)
            assert found["forecast_error_sum", name] == pytest.approx(sum(forecast_error(c)[layer] for c in ready))
            busiest = sum(cost.busy_ms[layer].max() for cost in costs) / 1e3
            assert found["slowest_device_seconds_sum", name] == pytest.approx(busiest)
            assert found["tokens_total", name, "local"] == sum(cost.load[layer].sum() for cost in costs)
            assert found["tokens_total", name, "sent"] == 0
            moves = sum(cost.preparation.layer_moves[layer] for cost in costs if cost.preparation)
            assert found["moves_total", name] == moves
            assert found["moved_bytes_total", name] == moves * 2 * 32 * 48 * 4
            assert found["waited_seconds_total", name, "0"] == 0
            for device in range(4):
                busy = sum(cost.busy_ms[layer, device] for cost in costs) / 1e3
                assert found["busy_seconds_total", str(device), name] == pytest.approx(busy)
                assert found["device_tokens", str(device), name] == costs[-1].device_load[layer, device]

    run(switch, Noise(switch.layout), telemetry, compare)
    with pytest.raises(OSError, match="refused"):
        scrape(telemetry.port)


def test_layers_that_no_token_reached_have_no_figures(switch):
    """Batches without decoder tokens run the encoder alone."""
    encoder_only = [dataclasses.replace(batch, decoder=None) for batch in batches()]
    telemetry = Telemetry(port=0)
    with telemetry, Engine(switch, Noise(switch.layout), 4, 8) as engine:
        costs = [output.stats for output in engine.run(encoder_only)]
        for cost in costs:
            telemetry.record(LAYERS, cost)
        found = scrape(telemetry.port)
    assert found["balancedness_count", "encoder_1"] == len(costs)
    assert ("balancedness_count", "decoder_1") not in found
    for cost in costs:
        document = figures(LAYERS, cost)
        encoder, decoder = document["layers"]
        assert (decoder["balancedness"], decoder["load_tv"]) == (None, None)
        assert document["load_tv"] == encoder["load_tv"]
        assert encoder["balancedness"] == cost.balancedness
        assert "NaN" not in json.dumps(document)
    encoder, decoder = over_batches(costs, LAYERS)
    assert (decoder["batches"], decoder["balancedness"]) == (0, None)
    assert encoder["batches"] == len(costs)
    assert encoder["balancedness"] == pytest.approx(np.mean([cost.balancedness for cost in costs]))


def test_every_batch_is_a_line_as_soon_as_it_has_run(switch, tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"

    def read():
        return [json.loads(line) for line in path.read_text().splitlines()]

    seen = []
    costs = run(switch, Noise(switch.layout), Telemetry(file=path), lambda costs: seen.append(len(read())))
    assert seen == [1, 2, 3, 4, 5, 6]
    for number, (line, cost) in enumerate(zip(read(), costs, strict=True)):
        assert line["batch"] == number
        expected = figures(LAYERS, cost)
        assert {name: line[name] for name in expected} == expected
        assert [layer["tokens_local"] for layer in line["layers"]] == cost.load.sum(-1).tolist()
        assert [layer["busy_ms"] for layer in line["layers"]] == cost.busy_ms.tolist()
        assert line["source"] == ("noise" if cost.preparation else "none")
    assert all(earlier["time"] <= later["time"] for earlier, later in pairwise(read()))
    run(switch, None, Telemetry(file=path))
    assert [line["batch"] for line in read()] == [*range(6), *range(6)], "a file that is there is continued"
    assert {line["source"] for line in read()[6:]} == {"none"}


def test_fallbacks_are_told_once_by_reason(switch, tmp_path):
    path, found = tmp_path / "metrics.jsonl", {}
    telemetry = Telemetry(port=0, file=path)
    costs = run(switch, Broken("raises"), telemetry, lambda costs: found.update(scrape(telemetry.port)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = sum(line["fallbacks"].get("RuntimeError: no forecast today", 0) for line in lines)
    assert told == found["fallbacks_total", "RuntimeError"] > 0
    assert found["late_total",] == sum(line["late"] for line in lines)
    forecasts = [cost.preparation and cost.preparation.forecast for cost in costs]
    sources = [forecast.source if forecast else "none" for forecast in forecasts]
    assert [line["source"] for line in lines] == [{"ema": "history"}.get(source, source) for source in sources]
    assert found["batches_total", "history"] == sources.count("ema") > 0


def test_figures_tell_local_from_sent_and_ranks_apart(switch):
    (cost, *_) = run(switch, None, Telemetry())
    two = dataclasses.replace(cost, sent=np.array([5, 0]), waited_ms=np.array([[1.0, 2.0], [0.0, 3.0]]))
    first, second = figures(LAYERS, two)["layers"]
    assert (first["tokens_sent"], first["tokens_local"]) == (5, two.load[0].sum() - 5)
    assert (first["waited_ms"], second["waited_ms"]) == ([1.0, 2.0], [0.0, 3.0])
    assert over_batches([two, two], LAYERS)[0]["sent_share"] == pytest.approx(5 / two.load[0].sum())
    assert [row["waited_ms"] for row in over_batches([two, two], LAYERS)] == [2.0, 3.0]


def test_offline_run_holds_every_batch(switch, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    costs = run(switch, Noise(switch.layout), Telemetry(wandb="mine", folder=tmp_path, settings={"devices": 4}))
    wandb.teardown()  # waits until all is written
    rows, project, settings = [], "", {}
    for record in records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))):
        project = record.run.project or project
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert project == "mine"
    assert settings["devices"] == 4
    assert [row["_step"] for row in rows] == list(range(len(costs)))
    for row, cost in zip(rows, costs, strict=True):
        assert row["compute_ms"] == pytest.approx(cost.compute_ms)
        for layer, name in enumerate(LAYERS):
            assert row[f"{name}/balancedness"] == pytest.approx(balancedness(cost.device_load)[layer])
            assert row[f"{name}/busy_ms"] == pytest.approx(cost.busy_ms[layer].max())


def test_what_cannot_be_opened_is_refused_and_nothing_stays_open(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"batch": 0}\n{"bat')
    (tmp_path / "file").touch()
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for settings, message in (
            ({"port": port, "file": tmp_path / "none.jsonl"}, f"metrics port {port} cannot be served: Address already"),
            ({"port": 70000}, "metrics port is 70000; expected 1 to 65535, or 0 for any free one"),
            ({"file": tmp_path}, ": Is a directory\\); choose another"),
            ({"file": tmp_path / "file" / "metrics.jsonl"}, "file: File exists\\); choose another"),
            ({"file": tmp_path / "cut.jsonl"}, "ends in the middle of a line; choose another, or remove it"),
        ):
            with pytest.raises(ValueError, match=message):
                Telemetry(**settings)
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(ValueError, match="cannot be written"):
        Telemetry(port=port, file=tmp_path)
    with Telemetry(port=port, file=tmp_path / "none.jsonl"):  # the port was given back
        assert scrape(port)
    assert not (tmp_path / "none.jsonl").exists(), "nothing ran, nothing stays"


def test_a_line_is_whole_or_not_there(switch, tmp_path):
    path = tmp_path / "metrics.jsonl"
    (cost, *_) = run(switch, None, Telemetry(file=path))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Telemetry(file=path) as telemetry:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))  # as a disk with little room
            with pytest.raises(OSError, match="no room for another line; make room, or choose another"):
                telemetry.record(LAYERS, cost)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before


def test_tiers_are_told_where_experts_do_not_fit(switch_folder, tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Telemetry(port=0, file=file) as telemetry:
        with Engine(str(switch_folder), device_memory=budget(4)) as engine:
            for output in engine.run(iter(batches())):
                telemetry.record(LAYERS, output.stats)
            counters = engine.replicated.cache.tiers[0].stats
        found = scrape(telemetry.port)
    last = json.loads(file.read_text().splitlines()[-1])["tiers"]["device"]
    assert last["misses"] == counters.misses > 0
    assert last["hit_rate"] == counters.hit_rate
    assert found["tier", "misses", "device"] == counters.misses
    assert found["tier", "stall_ms", "device"] == pytest.approx(last["stall_ms"])


def test_times_that_were_not_measured_are_none_in_every_sink(switch, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    telemetry = Telemetry(port=0, file=tmp_path / "batches.jsonl", wandb=True, folder=tmp_path)
    with telemetry, Engine(switch, None, 4, 8, measure=False) as engine:
        for output in engine.run(batches(2)):
            telemetry.record(LAYERS, output.stats)
        found = scrape(telemetry.port)
    lines = (tmp_path / "batches.jsonl").read_text().splitlines()
    documents = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert len(documents) == 2
    assert {document["compute_ms"] for document in documents} == {None}
    assert documents[0]["layers"][0]["busy_ms"] is documents[0]["layers"][0]["waited_ms"] is None
    assert found["compute_seconds_count",] == 0
    assert found["balancedness_count", LAYERS[0]] == 2
