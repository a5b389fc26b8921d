"""Kernels are compiled once, before ranks wait for each other's."""

import pytest

import runtime.balancing.balancer
import runtime.experts.dispatch


@pytest.fixture(scope="session", autouse=True)
def kernels():
    runtime.balancing.balancer.compile_kernels()
    runtime.experts.dispatch.compile_kernels()
