"""Devices in nodes, as `runtime.simulate` replays them: groups of experts, links, and what stays within a node."""

import numpy as np
import pytest

from runtime.simulate import compare_policies
from runtime.simulate.report import table
from tests.runtime.simulate.test_command import HARDWARE, RECORDED, simulate


def test_groups_of_experts_stay_on_their_node(tmp_path, monkeypatch, capsys):
    report = simulate(
        monkeypatch, capsys, RECORDED / "dsv2lite.npz", "--devices", 16, "--devices-per-node", 8, "--groups", 4,
        "--forecast", "last", "--planner", "contiguous,eplb,home,moving", "--split", "quota", "--steps", 20,
        "--save-plans", tmp_path / "plans.npz", "--out", tmp_path, "--expert-bytes", 9437184,
        "--tokens-per-second", 1e4, "--link-bytes-per-second", 25e9, "--expert-overhead-tokens", 0,
    )  # fmt: skip
    of = {item["planner"]: item for item in report["results"]}
    assert report["groups"] == 4
    assert of["home"]["near_moves"] == of["moving"]["near_moves"] == 1
    assert of["home"]["balancedness"] > of["contiguous"]["balancedness"]
    assert of["home"]["moves_per_layer"] < of["eplb"]["moves_per_layer"] / 10
    assert report["engines"]["export"] is None
    assert report["verdict"]["switch_on"] in {
        "Balancer(16, 16, 'last', devices_per_node=8, num_groups=4) with split_by_quota",
        "Balancer(16, 16, 'last', planner=EplbPlanner(4, 2), devices_per_node=8, num_groups=4) with split_by_quota",
    }
    with np.load(tmp_path / "plans.npz") as saved:
        for planner in ("eplb", "home", "moving"):
            phy2log = saved[f"last.{planner}.quota.phy2log"]
            group = np.where(phy2log >= 0, phy2log // 16, -1).reshape(-1, 2, phy2log.shape[-1] // 2)
            assert all(not set(first) & set(second) - {-1} for first, second in group), planner


def test_the_price_and_the_time_of_moves_between_nodes_follow_from_the_links(monkeypatch, capsys, tmp_path):
    found = {}
    for link in (25e9, 25e6):
        words = ["--devices-per-node", 4, "--forecast", "last", "--planner", "home", "--split", "quota", "--steps", 30]
        words += ["--expert-bytes", 9437184, "--tokens-per-second", 1e4, "--link-bytes-per-second", 25e9]
        words += ["--expert-overhead-tokens", 0, "--node-link-bytes-per-second", link, "--out", tmp_path]
        found[link] = simulate(monkeypatch, capsys, RECORDED / "gptoss20b.npz", *words)
    same, slow = found[25e9], found[25e6]
    assert same["results"][0]["near_moves"] < 0.8, "with equal links a node does not matter"
    assert slow["results"][0]["near_moves"] == 1
    assert slow["results"][0]["moves_per_layer"] < same["results"][0]["moves_per_layer"]
    assert slow["verdict"]["hardware"]["node_bytes_per_second"] == 25e6
    assert slow["verdict"]["switch_on"] == (
        "Balancer(8, 16, 'last', planner=HomePlanner(8, 16, None, 4, between_nodes=1000.0), devices_per_node=4) "
        "with split_by_quota"
    )


def test_devices_per_node_keeps_moves_within_a_node():
    report = compare_policies(
        RECORDED / "gptoss20b.npz", forecasts=["last"], planners=["eplb", "home"], splits=["quota"],
        hardware=HARDWARE, devices_per_node=4,
    )  # fmt: skip
    eplb, home = report["results"]
    assert home["near_moves"] == pytest.approx(0.65, abs=0.02)  # ties break by rounding, which processors differ in
    assert eplb["near_moves"] < 0.5
    assert home["near_tokens"] == pytest.approx(0.625, abs=0.01)
    assert home["balancedness"] == pytest.approx(0.976, abs=0.005)
    columns = {column.header: list(column.cells) for column in table(report).columns}
    assert columns["moves in a node"][1] == f"{home['near_moves']:.1%}"
    assert columns["tokens in a node"][1] == f"{home['near_tokens']:.1%}"
