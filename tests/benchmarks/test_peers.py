"""`make peers` in little: tests written for transformers run within an engine, and only those that did are counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM

CONFIG = MixtralConfig(
    vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=5, eos_token_id=None,
)
IDS = torch.arange(1, 9)[None]


@torch.no_grad()
def test_call():
    assert MixtralForCausalLM(CONFIG).eval()(IDS).logits.shape == (1, 8, 40)


def test_generate():
    model = MixtralForCausalLM(CONFIG).eval()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 11)
    assert model.config._experts_implementation != "switchcast"


def test_training():
    MixtralForCausalLM(CONFIG).train()(IDS, labels=IDS).loss.backward()


def test_without_a_model():
    pass
"""


def test_models_of_foreign_tests_run_within_an_engine(tmp_path):
    (tmp_path / "test_foreign.py").write_text(FOREIGN)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.support.in_engine",
        "--engine-report", "report.json", "test_foreign.py",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ran"] == {"test_call": 1, "test_generate": 1}
    assert report["compared"] == 1
    assert report["largest_difference"] <= 1e-6
    assert report["layers"] == 2 * (1 + 3)  # two MoE layers: a call, and three steps of generation
    assert report["moves"] > 0


@pytest.mark.parametrize("folder", ["empty", "absent/below"])
def test_no_clone_is_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "benchmarks.peers", "--transformers", str(tmp_path / folder)]
    env = os.environ | {"GIT_ALLOW_PROTOCOL": "none"}  # git refuses to clone, without a network
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "clone" in done.stderr
