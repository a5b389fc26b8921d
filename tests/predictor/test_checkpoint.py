"""A predictor folder: round trip, refusals, and what loading it imports."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.models.weights import read_embedding
from data.traces.trace import TokenBatch, pad_tokens
from predictor.checkpoint import CONFIG, WEIGHTS, load_predictor, save_predictor
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork
from tests.helpers.made_up_trace import EXPERTS, VOCABULARY, WIDTH, make_layout

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def saved(tmp_path, layout):
    torch.manual_seed(0)
    network = LoadNetwork(layout, Architecture(width=8))
    learned = NeuralForecaster(layout, network, read_embedding(layout.model_id), torch.full((2, 3, 3), 0.5))
    save_predictor(tmp_path / "p", learned, {"metrics": {}})
    return tmp_path / "p", learned


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_round_trip_forecasts_the_same(saved, layout, upcoming):
    folder, learned = saved
    loaded = load_predictor(folder, layout)
    history = np.arange(4 * 3 * EXPERTS).reshape(4, 3, EXPERTS)
    for tokens, past in ((upcoming, history), (upcoming, history[:0]), (None, history), (None, history[:0])):
        ours, theirs = learned.forecast(tokens, past), loaded.forecast(tokens, past)
        assert np.array_equal(ours.share, theirs.share)
        assert np.array_equal(ours.spread, theirs.spread)
        assert ours.made_at == len(past)
    assert loaded.forecast(upcoming, history).spread.min() > 0


def test_a_folder_of_format_1_still_forecasts_the_same():
    """Fixture v1 was written by `save_predictor`; forecast.json holds its forecasts (CPU, torch 2.13).

    The network was `LoadNetwork(make_layout("made-up"), Architecture(width=4, depth=1, history=True))` after
    `torch.manual_seed(0)`, its parameters drawn from `torch.randn` one after the other; spread was
    `torch.rand(2, 3, 3)`; embedding and history are those below. The folder also has the tensors of a rule for
    unfamiliar tokens, which this version leaves out.
    """
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    loaded = load_predictor(FIXTURES / "v1", make_layout("made-up"), table)
    expected = json.loads((FIXTURES / "v1" / "forecast.json").read_text())
    tokens = pad_tokens([np.array(row) for row in expected["tokens"]], 0)
    history = np.arange(4 * 3 * EXPERTS).reshape(4, 3, EXPERTS)
    for name, upcoming, past in (
        ("tokens", tokens, None), ("tokens_and_history", tokens, history), ("history", None, history)
    ):  # fmt: skip
        forecast = loaded.forecast(upcoming, past)
        for field in ("share", "tokens", "spread"):
            assert np.allclose(getattr(forecast, field), expected["forecasts"][name][field], rtol=1e-4, atol=1e-5), name


def test_weights_that_are_not_finite_are_refused(saved):
    folder, forecaster = saved
    next(forecaster.network.parameters()).data[0] = torch.nan
    save_predictor(folder, forecaster)
    with pytest.raises(ValueError, match=r"has NaN or infinite numbers in .*; train the predictor again"):
        load_predictor(folder)


def test_embedding_is_not_in_the_folder(saved):
    assert sum(file.stat().st_size for file in saved[0].iterdir()) < 20_000


def test_a_stored_model_id_is_enough(saved):
    assert torch.equal(load_predictor(saved[0]).embedding, saved[1].embedding)


def test_another_model_is_refused_with_both_fingerprints(saved, layout):
    other = make_layout("another", routers="x")
    with pytest.raises(ValueError, match=f"{layout.fingerprint()}.*{other.fingerprint()}"):
        load_predictor(saved[0], other)


def test_a_model_fine_tuned_with_frozen_routers_is_refused(saved, layout):
    folder, learned = saved
    load_predictor(folder, replace(layout, dense="d"))  # the folder is of a version without that digest
    learned.layout = replace(layout, dense="e")
    save_predictor(folder, learned)
    load_predictor(folder, layout)
    with pytest.raises(
        ValueError, match=r"was trained for .*: the same routers, other weights before them\); train a pre"
    ):
        load_predictor(folder, replace(layout, dense="d"))


def test_the_same_model_elsewhere_is_fine(saved, upcoming):
    elsewhere = make_layout("/moved/elsewhere")
    loaded = load_predictor(saved[0], elsewhere, embedding=saved[1].embedding)
    assert np.array_equal(loaded.forecast(upcoming, np.zeros((0, 3, EXPERTS), int)).share.shape, (3, EXPERTS))


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_damaged_weights_are_refused(saved, damage):
    path = saved[0] / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    {"cut": lambda: path.write_bytes(content[:-8]), "bit": lambda: path.write_bytes(content), "gone": path.unlink}[
        damage
    ]()
    with pytest.raises(ValueError, match="is missing" if damage == "gone" else "cut short, edited or swapped"):
        load_predictor(saved[0])


def test_edited_configuration_is_refused(saved):
    config = json.loads((saved[0] / CONFIG).read_text())
    edit(saved[0], layout=config["layout"] | {"num_experts": 4})
    with pytest.raises(ValueError, match="its fields give"):
        load_predictor(saved[0])
    edit(saved[0], layout=config["layout"], architecture=config["architecture"] | {"width": 16})
    with pytest.raises(ValueError, match="do not fit together"):
        load_predictor(saved[0])
    edit(saved[0], format_version=99)
    with pytest.raises(ValueError, match="has format version 99; this version reads 1"):
        load_predictor(saved[0])
    (saved[0] / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_predictor(saved[0])


def test_folders_of_something_else_are_refused_with_the_mend(tmp_path):
    (tmp_path / "trace.json").write_text("{}")
    hint = re.escape(f"it is a trace: `python train.py --data.trace {tmp_path}` trains one")
    for name, said in ((None, hint), ("config.json", hint)):
        if name:
            (tmp_path / name).write_text('{"model_type": "olmoe"}')
        with pytest.raises(ValueError, match=f"holds no predictor; expected the folder that .*{said}"):
            load_predictor(tmp_path)
    (tmp_path / "trace.json").unlink()
    with pytest.raises(ValueError, match=r"expected the folder that `python train.py` wrote$"):
        load_predictor(tmp_path)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"is not a folder; expected a predictor written by `python train\.py`"):
        load_predictor(tmp_path / "nothing")


def test_token_beyond_the_table_is_refused(saved):
    tokens = TokenBatch(torch.full((1, 2), VOCABULARY), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} has no row"):
        saved[1].forecast(tokens, np.zeros((0, 3, EXPERTS), int))


def imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"lightning", "pytorch_lightning", "wandb", "sklearn", "datasets", "matplotlib"}


def test_what_a_runtime_imports_is_light():
    code = "import predictor, predictor.checkpoint, predictor.baselines\nfrom predictor import Ema, load_predictor"
    assert imported(code) & HEAVY == set()
    assert "torch" not in imported("from predictor import Ema, LastBatch, LoadForecast")
    assert imported("import predictor.training.module") >= {"lightning"}  # the two lines above can fail


BLOCK = """
import importlib.metadata, json, re, sys
import numpy, torch, safetensors.torch
needs = [re.match(r"[\\w-]+", line)[0].lower() for line in importlib.metadata.requires("torch")]
allowed = {"torch", "numpy", "numba", "llvmlite", "safetensors", "data", "predictor"}
allowed |= {"mpmath", *needs, "typing_extensions"}

class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ImportError(f"{name} is a third package")

sys.meta_path.insert(0, OnlyThese())
"""


def test_a_local_predictor_needs_torch_numpy_numba_and_safetensors_only(host):
    """Every other third-party import fails, those that torch itself requires excepted."""
    code = f"""{BLOCK}
from dataclasses import replace
from data.models.layout import MoELayout
from predictor import load_predictor
folder = "{FIXTURES / "v1"}"
layout = MoELayout.from_json(json.load(open(folder + "/config.json"))["layout"])
predictor = load_predictor(folder, replace(layout, model_id="{host}"))
forecast = predictor.forecast({{"input_ids": [[1, 2, 3]]}}, [[[1] * {EXPERTS}] * 3])
assert forecast.load.shape == (3, {EXPERTS})
"""
    assert not imported(code) & {"transformers", "huggingface_hub", "packaging", "pyarrow", "jsonargparse"}
    with pytest.raises(subprocess.CalledProcessError):
        imported(BLOCK + "import yaml")
