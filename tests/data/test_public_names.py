"""The public names of `data`, and what importing it loads."""

import ast
import subprocess
import sys

import pytest

import data

PUBLIC = {
    "MoELayout": "data.models.layout",
    "RouterTap": "data.traces.router_tap",
    "TokenBatch": "data.traces.trace",
    "open_trace": "data.traces.store",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint([name for name in sys.modules if '.' not in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_names_come_from_their_modules():
    assert set(data.__all__) == set(PUBLIC)
    for name, home in PUBLIC.items():
        assert getattr(data, name).__module__ == home
    with pytest.raises(AttributeError, match="module 'data' has no attribute 'nothing'"):
        _ = data.nothing


def test_the_package_alone_loads_no_torch():
    assert not {"torch", "numpy", "pyarrow"} & loaded_by("import data, data.models, data.text, data.traces")


def test_what_a_predictor_needs_loads_torch_numpy_and_safetensors_only():
    needed = "import data.arrays, data.files, data.models.layout, data.models.weights, data.traces.trace"
    loaded = loaded_by(needed)
    assert {"torch", "numpy", "safetensors"} <= loaded
    assert not {"huggingface_hub", "transformers", "tokenizers", "pyarrow", "datasets", "lightning"} & loaded
