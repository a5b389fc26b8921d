"""Made-up workloads: as the command writes them, and what they are made to show."""

import sys

import numpy as np

from runtime.simulate import compare_policies
from runtime.simulate.cost_model import Hardware
from runtime.simulate.workloads import WORKLOADS, main

HARDWARE = Hardware(9437184, tokens_per_second=1e5, bytes_per_second=25e9, expert_overhead_tokens=0)


def test_the_workloads_command_writes_them_all(tmp_path, monkeypatch):
    small = {name: lambda rng: rng.poisson(3, (2, 1, 8)) for name in WORKLOADS}
    monkeypatch.setattr("runtime.simulate.workloads.WORKLOADS", small)
    monkeypatch.setattr(sys, "argv", ["workloads", str(tmp_path / "made"), "--seed", "3"])
    main()
    assert sorted(path.stem for path in (tmp_path / "made").iterdir()) == sorted(WORKLOADS)
    assert np.load(tmp_path / "made" / "zipf.npz")["counts"].shape == (2, 1, 8)


def test_workloads_are_the_same_for_the_same_seed_and_keep_their_tokens():
    for name, make in WORKLOADS.items():
        if name != "adversary":
            loads = make(np.random.default_rng(7))
            assert (loads == make(np.random.default_rng(7))).all()
            assert (loads.sum(-1) == 4096).all()


def test_the_adversary_defeats_history_and_not_the_oracle(tmp_path):
    np.savez(tmp_path / "adversary.npz", counts=WORKLOADS["adversary"](np.random.default_rng(0))[:40])
    report = compare_policies(tmp_path / "adversary.npz", 8, 16, None, ("home",), ("quota",), hardware=HARDWARE)
    balance = {item["forecast"]: item["balancedness"] for item in report["results"]}
    assert {item["forecast"]: item["gap_closed"] for item in report["results"]}["oracle"] == 1
    assert balance["last"] < 0.6
    assert balance["oracle"] > 0.99
