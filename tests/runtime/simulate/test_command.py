import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.convert import convert
from runtime.balancing.plan import ReplicationPlan
from runtime.simulate import compare_policies
from runtime.simulate.__main__ import main
from runtime.simulate.cost_model import Hardware

RECORDED = Path(__file__).parents[1] / "recorded"
HARDWARE = Hardware(9437184, tokens_per_second=1e5, bytes_per_second=25e9, expert_overhead_tokens=0)


def simulate(monkeypatch, capsys, *arguments):
    """The JSON document of a run in this process."""
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, arguments)])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refuse(monkeypatch, capsys, *arguments):
    """What stderr says when a run is refused."""
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    return error[0]


def test_the_json_document_and_plans_that_bear_it_out(tmp_path, monkeypatch, capsys):
    plans = tmp_path / "plans.npz"
    report = simulate(
        monkeypatch, capsys, RECORDED / "dsv2lite.npz", "--forecast", "last,oracle", "--start", 4, "--steps", 20,
        "--save-plans", plans, "--out", tmp_path,
    )  # fmt: skip
    assert (report["devices"], report["redundant"], report["steps"]) == (8, 16, 20)
    names = [(item["forecast"], item["planner"], item["split"]) for item in report["results"]]
    assert names[0] == ("none", "contiguous", "even")
    assert ("last", "home", "quota") in names
    assert len(names) == 1 + 2 * 2 * 2
    loads = np.load(RECORDED / "dsv2lite.npz")["counts"].astype(int)[4:24]
    with np.load(plans) as saved:
        for item in report["results"]:
            name = f"{item['forecast']}.{item['planner']}.{item['split']}"
            device_load, phy2log = saved[f"{name}.device_load"], saved[f"{name}.phy2log"]
            assert (device_load.sum(-1) == loads.sum(-1)).all()
            assert phy2log.shape == (20, 5, 64 if item["planner"] == "contiguous" else 80)
            assert np.mean(device_load.mean(-1) / device_load.max(-1)) == pytest.approx(item["balancedness"], abs=1e-4)
    ours = {
        item["forecast"]: item for item in report["results"] if (item["planner"], item["split"]) == ("home", "quota")
    }
    assert ours["oracle"]["gap_closed"] is None  # the oracle gains less than LEAST_GAP here
    assert ours["oracle"]["balancedness"] > ours["last"]["balancedness"] > 0.95
    assert (tmp_path / "balancedness.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_with_a_price_of_an_active_expert_the_planner_that_counts_it_is_faster():
    priced = replace(HARDWARE, tokens_per_second=1e4, expert_overhead_tokens=40)
    report = compare_policies(
        RECORDED / "dsv2lite.npz", 8, 16, ("ema",), ("home", "timed"), ("quota",), hardware=priced
    )  # fmt: skip
    alone = compare_policies(RECORDED / "dsv2lite.npz", 8, 16, ("ema",), ("home",), ("quota",), hardware=priced)
    verdict, balance = report["verdict"], {item["planner"]: item["balancedness"] for item in report["results"]}
    assert verdict["policy"]["planner"] == "timed"
    assert verdict["step_ms"]["with"] < 0.97 * alone["verdict"]["step_ms"]["with"]
    assert balance["timed"] < balance["home"], "balancedness counts tokens"
    assert verdict["switch_on"] == "Balancer(8, 16, 'ema', expert_overhead_tokens=40) with split_by_quota"


@pytest.mark.parametrize(
    ("name", "devices", "redundant", "without"),
    [
        ("dsv2lite", 6, 8, "4 of 6 devices have 11 of 64 experts, the others 10"),
        ("dsv2lite", 72, 8, "64 of 72 devices have 1 of 64 experts, the others 0"),
        ("gptoss20b", 12, 16, "8 of 12 devices have 3 of 32 experts, the others 2"),
    ],
)
def test_experts_need_not_divide_over_the_devices(name, devices, redundant, without, tmp_path, monkeypatch, capsys):
    loads = RECORDED / f"{name}.npz"
    arguments = [
        loads, "--devices", devices, "--redundant", redundant, "--forecast", "last,oracle", "--steps", 20,
        "--planner", "contiguous,eplb,home,moving", "--save-plans", tmp_path / "plans.npz", "--out", tmp_path,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, arguments)])
    main()
    shown = capsys.readouterr().out
    assert without in shown
    report = json.loads(shown.splitlines()[-1])
    assert len(report["results"]) == 1 + 2 * 3 * 2
    assert len(report["engines"]["plans"]) == 2
    loads = np.load(loads)["counts"].astype(int)[1:21]
    layers, experts = loads.shape[1:]
    with np.load(tmp_path / "plans.npz") as saved:
        for item in report["results"]:
            policy = f"{item['forecast']}.{item['planner']}.{item['split']}"
            phy2log, device_load = saved[f"{policy}.phy2log"], saved[f"{policy}.device_load"]
            assert (device_load.sum(-1) == loads.sum(-1)).all()
            replicated = item["planner"] != "contiguous"
            assert phy2log.shape[2] == (experts + redundant if replicated else -(-experts // devices) * devices)
            held = phy2log.reshape(20 * layers, -1)
            assert all(set(row) >= set(range(experts)) for row in held.tolist()), policy
            if item["planner"] == "eplb":
                assert f"{policy}.home_slots" not in saved
                continue
            homes = saved[f"{policy}.home_slots"]
            assert homes.shape == (20, layers, experts)
            assert (np.take_along_axis(phy2log, homes, axis=-1) == np.arange(experts)).all()
            assert item["planner"] == "moving" or (homes == homes[0]).all(), policy
        bare = saved["none.contiguous.even.phy2log"].reshape(-1, devices, -(-experts // devices))
        each = (bare >= 0).sum(-1)
        assert set(np.unique(each)) == {experts // devices, experts // devices + 1}
        owner = (np.arange(devices)[:, None] * np.ones_like(bare[0])).ravel()
        counted = np.zeros((20, layers, devices), dtype=int)
        for (step, layer), row in zip(np.ndindex(20, layers), bare.reshape(len(bare), -1), strict=True):
            np.add.at(counted[step, layer], owner[row >= 0], loads[step, layer][row[row >= 0]])
        assert (counted == saved["none.contiguous.even.device_load"]).all()
    of = {(item["forecast"], item["planner"], item["split"]): item["balancedness"] for item in report["results"]}
    assert of["oracle", "moving", "quota"] > of["last", "moving", "quota"] > of["none", "contiguous", "even"]


def test_homes_are_saved_where_they_are_not_the_first_slots_of_each_device(tmp_path):
    compare_policies(
        RECORDED / "gptoss20b.npz", 8, 8, ("last",), ("home", "moving"), ("quota",), steps=10, hardware=HARDWARE,
        save_plans=tmp_path / "plans.npz",
    )  # fmt: skip
    with np.load(tmp_path / "plans.npz") as saved:
        assert "last.home.quota.home_slots" not in saved
        phy2log, homes = (saved[f"last.moving.quota.{name}"] for name in ("phy2log", "home_slots"))
    plan = ReplicationPlan(phy2log[-1], 8, homes[-1])
    assert (plan.is_home_slot.reshape(4, 8, -1)[..., :-1] == 0).any(), "a home has moved to a replica slot"


def test_as_a_command_the_last_line_is_json(tmp_path):
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).poisson(20, (20, 1, 8)))
    command = [
        sys.executable,
        "-m",
        "runtime.simulate",
        tmp_path / "loads.npy",
        "--out",
        tmp_path,
        "--planner",
        "home",
    ]
    done = subprocess.run([*command, "--redundant", "0"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert "Verdict: not worth it" in done.stdout.splitlines()[0]
    assert {item["moves_per_layer"] for item in report["results"]} == {0}
    assert report["verdict"]["answer"] == "not worth it"


def test_from_python_an_array_gives_the_same_report_as_the_command_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = RECORDED / "gptoss20b.npz"
    slow = replace(HARDWARE, tokens_per_second=1e4)  # beside whose steps the time of planning here does not count
    choice = {"forecasts": ("last",), "planners": ("home",), "splits": ("quota",), "steps": 20, "hardware": slow}
    report = compare_policies(np.load(path)["counts"], 8, 16, **choice)
    assert not list(tmp_path.iterdir())
    command = simulate(
        monkeypatch, capsys, path, "--forecast", "last", "--planner", "home", "--split", "quota", "--steps", 20,
        "--expert-bytes", 9437184, "--tokens-per-second", 1e4, "--link-bytes-per-second", 25e9,
        "--expert-overhead-tokens", 0,
    )  # fmt: skip
    timed = {"plan_ms", "split_us"}
    for one, other in zip(report["results"], command["results"], strict=True):
        assert {name: one[name] for name in one.keys() - timed} == {name: other[name] for name in other.keys() - timed}
    verdict = report["verdict"]
    assert verdict["answer"] == command["verdict"]["answer"] == "enable"
    assert verdict["switch_on"] == "Balancer(8, 16, 'last') with split_by_quota"


@pytest.mark.parametrize(
    ("split", "line"),
    [
        ("even", "rebalance_experts(load, num_replicas=48, num_groups=1, num_nodes=1, num_gpus=8)"),
        ("quota", "Balancer(8, 16, 'last', planner=EplbPlanner()) with split_by_quota"),
    ],
)
def test_the_verdict_names_what_switches_eplb_on(split, line):
    report = compare_policies(
        RECORDED / "gptoss20b.npz", forecasts="last", planners="eplb", splits=split, steps=40,
        hardware=replace(HARDWARE, bytes_per_second=1e15),
    )  # fmt: skip
    assert report["verdict"]["switch_on"] == line


def test_homes_that_move_are_a_planner_of_their_own():
    fixed, moving = (
        compare_policies(
            RECORDED / "gptoss20b.npz", 8, 8, "last", planners=planner, splits="quota", steps=40, max_moves=40,
            hardware=replace(HARDWARE, bytes_per_second=1e15),
        )
        for planner in ("home", "moving")
    )  # fmt: skip
    assert moving["results"][0]["planner"] == "moving"
    assert moving["results"][0]["balancedness"] > fixed["results"][0]["balancedness"]
    assert moving["verdict"]["switch_on"] == (
        "Balancer(8, 8, 'last', planner=HomePlanner(8, 8, 40, None, moving_homes=True)) with split_by_quota"
    )


def test_steps_and_layers_without_tokens_are_in_no_figure(tmp_path, monkeypatch, capsys):
    """The unused end of a ring buffer, and a model's dense first layers."""
    rng, share = np.random.default_rng(0), 1 / np.arange(1, 17) / (1 / np.arange(1, 17)).sum()
    real = np.stack([[rng.multinomial(512, share) for _ in range(3)] for _ in range(24)])
    padded = np.concatenate([np.zeros((24, 2, 16), int), real], 1)
    padded = np.concatenate([padded, np.zeros((9, 5, 16), int)])
    reports = {}
    for name, loads in (("real", real), ("padded", padded)):
        np.save(tmp_path / f"{name}.npy", loads)
        reports[name] = simulate(
            monkeypatch, capsys, tmp_path / f"{name}.npy", "--devices", 4, "--redundant", 4, "--out", tmp_path,
            "--expert-bytes", 9437184, "--tokens-per-second", 1e5, "--link-bytes-per-second", 25e9,
            "--expert-overhead-tokens", 0, "--save-plans", tmp_path / f"{name}.npz",
        )  # fmt: skip
    timed = {"plan_ms", "split_us"}
    for one, other in zip(reports["real"]["results"], reports["padded"]["results"], strict=True):
        assert {name: one[name] for name in one.keys() - timed} == {name: other[name] for name in other.keys() - timed}
    assert reports["real"]["results"][0]["balancedness"] < 0.6
    found = reports["padded"]
    assert (found["steps"], found["layers"], found["left_out"]) == (23, 3, {"steps": 9, "layers": [0, 1]})
    assert np.load(tmp_path / "padded.npz")["layers"].tolist() == [2, 3, 4]
    capsys.readouterr()
    words = [tmp_path / "padded.npy", "--devices", 4, "--redundant", 4, "--forecast", "last", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, words)])
    main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out, because they hold no tokens: 9 steps and 2 of 5 layers" in shown


def test_a_layer_that_is_silent_in_some_steps_counts_in_the_others():
    real = np.random.default_rng(0).multinomial(512, np.full(16, 1 / 16), (20, 2))
    real[5:, 1] = 0
    whole = compare_policies(real, 4, 4, forecasts="last", hardware=HARDWARE)["results"][0]
    first = compare_policies(real[:, :1], 4, 4, forecasts="last", hardware=HARDWARE)["results"][0]
    second = compare_policies(real[:5, 1:], 4, 4, forecasts="last", hardware=HARDWARE)["results"][0]
    expected = (19 * first["balancedness"] + 4 * second["balancedness"]) / 23
    assert whole["balancedness"] == pytest.approx(expected, abs=1e-4)


def test_a_trace_of_counts_is_streamed_and_gives_the_same_report(tmp_path, monkeypatch):
    """With steps and layers without tokens, and more steps than forecasters see."""
    rng, share = np.random.default_rng(0), 1 / np.arange(1, 17) / (1 / np.arange(1, 17)).sum()
    loads = np.stack([[rng.multinomial(512, rng.permutation(share)) for _ in range(3)] for _ in range(150)])
    loads[:, 1], loads[40:50] = 0, 0
    np.save(tmp_path / "loads.npy", loads)
    monkeypatch.setattr("data.convert.SHARD_STEPS", 16)
    convert(tmp_path / "loads.npy", tmp_path / "trace")
    monkeypatch.setattr("data.traces.store.StoredTrace.loads", None)  # else all of them would be in memory
    choice = {"forecasts": ["mean", "ema", "exact"], "splits": ["quota"], "hardware": HARDWARE, "devices_per_node": 4}
    reports = [compare_policies(source, 8, 8, **choice) for source in (tmp_path / "trace", loads)]
    timed = {"plan_ms", "split_us"}
    for one, other in zip(*(report["results"] for report in reports), strict=True):
        assert {name: one[name] for name in one.keys() - timed} == {name: other[name] for name in other.keys() - timed}
    assert (reports[0]["steps"], reports[0]["layers"]) == (139, 2)
    assert [report["left_out"] for report in reports] == [
        {"steps": steps, "layers": [1]}
        for steps in (0, 10)  # those of the trace were left out when it was converted
    ]


def test_max_moves_bounds_the_moves_of_a_step():
    balance = []
    for most in (1, 4, None):
        report = compare_policies(
            RECORDED / "gptoss20b.npz", forecasts="last", planners="home", splits="quota", hardware=HARDWARE,
            max_moves=most,
        )  # fmt: skip
        result = report["results"][0]
        assert report["max_moves"] == most
        assert most is None or result["moves_per_layer"] * 4 <= most  # 4 layers
        balance.append(result["balancedness"])
    assert balance == pytest.approx([0.866, 0.941, 0.976], abs=0.001)


def test_policies_share_forecasts_but_not_plans(tmp_path, monkeypatch, capsys):
    loads = RECORDED / "gptoss20b.npz"
    both = simulate(monkeypatch, capsys, loads, "--steps", 10, "--forecast", "last", "--out", tmp_path)
    one = simulate(
        monkeypatch, capsys, loads, "--steps", 10, "--forecast", "last", "--planner", "home", "--split", "quota",
        "--out", tmp_path,
    )  # fmt: skip
    figures = ("balancedness", "p05", "ratio_of_sums", "moves_per_layer")
    twin = next(item for item in both["results"] if (item["planner"], item["split"]) == ("home", "quota"))
    assert [one["results"][0][name] for name in figures] == [twin[name] for name in figures]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.npz"], "nowhere.npz does not exist"),
        (
            ["LOADS", "--devices", "6"],
            "64 experts and 16 redundant experts do not divide over 6 devices; choose 14 or 20",
        ),
        (["LOADS", "--redundant", "12"], "12 redundant experts do not divide over 8 devices; choose 8 or 16 redundant"),
        (["LOADS", "--forecast", "tea"], "forecast: unknown 'tea'; choose from last, ema, mean, own, learned"),
        (
            ["LOADS", "--forecast", "learned"],
            "forecast learned needs a predictor: give a folder",
        ),
        (["LOADS", "--forecast", "learned", "--predictor", "nowhere"], "nowhere"),
        (
            ["LOADS", "--planner", "timed", "--expert-overhead-tokens", "0"],
            "give --expert-overhead-tokens of 1 or more",
        ),
        (["LOADS", "--planner", "timed", "--gpu", "h100_sxm", "--like", "gpt_oss_20b"], "of 1 or more, without --gpu"),
        (["LOADS", "--start", "0"], "error: start is 0, expected 1 to 63"),
        (["LOADS", "--steps", "99"], "error: steps is 99, expected 1 to 63"),
        (["LOADS", "--max-moves", "-1"], "--max-moves is -1, expected 0 or more"),
        (["LOADS", "--devices-per-node", "3"], "devices_per_node is 3, which does not divide 8 devices"),
        (
            ["LOADS", "--devices-per-node", "4", "--groups", "3"],
            "3 groups of experts cannot be shared equally by 2 nodes",
        ),
        (
            ["LOADS", "--devices-per-node", "4", "--groups", "6"],
            "64 experts do not divide into 6 groups; choose a divisor",
        ),
        (["LOADS", "--groups", "4"], "4 groups of experts stay on their nodes, and devices_per_node is not given"),
        (["LOADS", "--node-link-bytes-per-second", "1e9"], "for several nodes; add --devices-per-node"),
        (
            ["LOADS", "--gpu", "h100_sxm", "--devices-per-node", "4", "--node-link-bytes-per-second", "1e9"],
            "--gpu takes speeds from measured tables",
        ),
        (["LOADS", "--bandwith", "9"], "unrecognized arguments: --bandwith 9; see --help"),
        (["LOADS", "--tokens-per-second", "0"], "tokens_per_second is 0.0, expected a finite number above 0"),
        ([], "the following arguments are required: loads; see --help"),
        (["LOADS", "--slots", "4"], "--slots is for --serve prefill or --serve decode; add that, or leave it out"),
        (["LOADS", "--stream", "unseen"], "--stream is for --serve prefill or --serve decode"),
    ],
)
def test_mistakes_end_in_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    arguments = [RECORDED / "dsv2lite.npz" if item == "LOADS" else item for item in arguments]
    assert text in refuse(monkeypatch, capsys, *arguments, "--out", tmp_path)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((4, 8)), r"has shape (4, 8), expected [steps, layers, experts]"),
        (np.zeros((0, 1, 8)), "at least one of each"),
        (np.ones((1, 1, 8)), "1 step with tokens was recorded, expected 2 or more"),
        (np.zeros((4, 1, 8)), "holds no tokens in any of its 4 steps"),
        (np.full((4, 1, 8), np.nan), "not whole numbers"),
        (np.full((4, 1, 8), -1), "holds -1; tokens cannot be negative"),
        (np.full((4, 1, 8), "x"), "expected counts of tokens"),
    ],
)
def test_arrays_that_are_no_loads_are_refused(array, text, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "loads.npy", array)
    assert text in refuse(monkeypatch, capsys, tmp_path / "loads.npy")


def test_damaged_files_are_refused(tmp_path, monkeypatch, capsys):
    whole = (RECORDED / "dsv2lite.npz").read_bytes()
    for name, content in (("cut.npz", whole[:5000]), ("empty.npy", b""), ("text.npy", b"not numpy")):
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read" in refuse(monkeypatch, capsys, tmp_path / name)
    np.savez(tmp_path / "key.npz", loads=np.ones((2, 1, 8)))
    assert "key.npz holds ['loads'], expected the key 'counts'" in refuse(monkeypatch, capsys, tmp_path / "key.npz")
