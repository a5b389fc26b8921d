"""What all tests of the runtime need once."""

import pytest

from runtime.balancing.balancer import compile_kernels


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Compiled before any test: plans of tests must not come late because of the compiler."""
    compile_kernels()
