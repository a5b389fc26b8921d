"""Kernels that were compiled once are found by later processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import logging, numpy as np
logging.basicConfig(level=logging.INFO)
from runtime.balancing.balancer import Balancer, compile_kernels
if {compile}: compile_kernels()
else:
    balancer = Balancer(4, 4)
    for load in np.random.default_rng(0).poisson(9, (4, 2, 16)): balancer.step(load)
"""


def test_compiled_kernels_serve_later_processes(tmp_path):
    def run(script):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stderr

    assert "compiling the planner's kernels" in run(SCRIPT.format(compile=True))
    assert "compiling" not in run(SCRIPT.format(compile=False))
