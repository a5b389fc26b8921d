"""Worked examples in docstrings are right."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    "balancer", "eplb", "leveling", "local_search", "matching", "max_flow", "packing", "plan", "split", "water_filling",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    result = doctest.testmod(import_module(f"runtime.balancing.{name}"))
    assert result.failed == 0
    assert result.attempted >= 2
