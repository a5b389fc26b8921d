"""Worked examples in docstrings are right."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("balancer", 8),
        ("eplb", 2),
        ("local_search", 5),
        ("max_flow", 2),
        ("plan", 4),
        ("split", 5),
        ("water_filling", 3),
    ],
)
def test_examples_of(name, least):
    result = doctest.testmod(import_module(f"runtime.balancing.{name}"))
    assert result.failed == 0
    assert result.attempted >= least
