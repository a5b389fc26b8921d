"""`make peers` without the wheels: how a peer's files are found, what stands in for the rest, one line without any."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from benchmarks.support import peer_wheels
peer_wheels.fetch(Path(sys.argv[1]))
peer_wheels.install(Path(sys.argv[1]))
from sglang.srt.eplb.placement import read
from vllm.distributed.eplb.policy import EPLB_POLICIES, AbstractEplbPolicy
from runtime.export.vllm_policy import register
import torch
peer_wheels.SGLANG["file"] = "plan.json"
assert issubclass(register(), AbstractEplbPolicy)
print(read(), EPLB_POLICIES["default"].rebalance_experts(torch.ones(1, 4), 6, 1, 1, 2).shape)
"""
PLACEMENT = """
from sglang.srt.runtime_context import get_exec
from sglang.srt.unrelated.thing import Whatever
def read():
    Whatever(1)
    return get_exec().moe.init_expert_location
"""
POLICY = """
from typing import get_args
from vllm.config.parallel import EPLBPolicyOption
from vllm.logger import init_logger
class AbstractEplbPolicy:
    pass
init_logger(__name__).info("read")
EPLB_POLICIES = {name: AbstractEplbPolicy for name in get_args(EPLBPolicyOption)}
"""


def run(*words, **env):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | env)


def test_unpacked_files_are_run_and_all_others_stand_in(tmp_path):
    for path, content in (("sglang/srt/eplb/placement.py", PLACEMENT), ("vllm/distributed/eplb/policy.py", POLICY)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).parent.joinpath("__init__.py").touch()
        (tmp_path / path).write_text(content)
    done = run("-c", SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "plan.json torch.Size([1, 6])\n"


def test_no_wheels_is_one_line(tmp_path):
    done = run("-m", "benchmarks.peer_engines", "--folder", str(tmp_path), PIP_NO_INDEX="1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: sglang==0.5.23 could not be downloaded (")
    assert last.endswith("give a folder where they are unpacked: --folder FOLDER")
