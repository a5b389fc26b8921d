"""The public names, each importable from its package and from `switchcast`; a new one needs a line in the docs."""

import subprocess
import sys
from pathlib import Path

import pytest

import data
import predictor
import runtime
import switchcast

ROOT = Path(__file__).parents[1]
PUBLIC = {
    data: {"MoELayout", "RouterTap", "TokenBatch", "open_trace"},
    predictor: {"Ema", "Forecaster", "LastBatch", "LoadForecast", "load_predictor"},
    runtime: {
        "Balancer", "BatchOutput", "BatchStats", "Engine", "ModelBatch", "ReplicationPlan", "SlotMove", "balancedness",
        "check_plan", "export_plan", "load_plan", "rebalance_experts", "save_plan", "split_by_quota",
    },
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_names_are_these_and_import(package):
    assert set(package.__all__) == PUBLIC[package]
    for name in package.__all__:
        assert getattr(switchcast, name) is getattr(package, name)


def test_switchcast_exports_all_of_them():
    assert set(switchcast.__all__) == set.union(*PUBLIC.values())
    with pytest.raises(AttributeError, match="module 'switchcast' has no attribute 'nothing'"):
        switchcast.nothing  # noqa: B018


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in switchcast.__all__ if f"`{name}" not in page] == []


def switchcast_command(*words):
    return subprocess.run([sys.executable, "-m", "switchcast", *words], capture_output=True, text=True, cwd=ROOT)


def test_the_command_lists_its_commands_and_refuses_others():
    listed = switchcast_command("--help").stdout
    assert "simulate   replay recorded loads" in listed
    assert "check-plan " in listed
    refused = switchcast_command("deploy")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: 'deploy' is no command; expected one of collect, train, infer, simulate, export, check-plan, show, "
        "convert, pretrain\n"
    )
