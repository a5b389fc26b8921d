"""Models of the hub load as local folders do, by revision, from the cache of downloads without a network."""

import json
import os
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import as_pickled

CODE = """
import json, sys
from data.models.model import load_dense, load_model, outline
from data.models.weights import ModelWeights, read_embedding

found = {}
for revision in ("", "v2"):
    whole, dense = load_model("owner/name", revision), load_dense("owner/name", revision)
    table = read_embedding("owner/name", revision)
    converted = ModelWeights("owner/name", revision).as_safetensors().read("shared.weight")
    assert whole.layout == dense.layout and outline("owner/name", revision).layout.num_experts == 8
    assert (table == whole.model.shared.weight).all() and (table == converted).all()
    found[revision] = [whole.layout.revision, whole.layout.fingerprint(), float(table.double().sum())]
for name, revision in (("owner/name", "v3"), ("owner/other", "")):
    try:
        load_model(name, revision)
    except ValueError as error:
        found[f"{name}@{revision}"] = str(error)
print(json.dumps(found))
"""


def snapshot(hub, folder, revision):
    """Puts a model folder into the cache of downloads under a branch's name."""
    place = hub / "models--owner--name"
    shutil.copytree(folder, place / "snapshots" / f"commit-{revision}")
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(f"commit-{revision}")


def test_pickled_models_of_two_revisions(switch_folder, tmp_path):
    first, second = (shutil.copytree(switch_folder, tmp_path / name) for name in ("first", "second"))
    tensors = load_file(second / "model.safetensors")
    save_file({name: each + 1 for name, each in tensors.items()}, second / "model.safetensors", {"format": "pt"})
    tables = [
        float(load_file(folder / "model.safetensors")["shared.weight"].double().sum()) for folder in (first, second)
    ]
    snapshot(tmp_path / "hub", as_pickled(first), "main")
    snapshot(tmp_path / "hub", as_pickled(second, 3), "v2")
    environment = {
        "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "SWITCHCAST_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert torch.allclose(torch.tensor([found[""][2], found["v2"][2]]), torch.tensor(tables))
    assert (found[""][0], found["v2"][0]) == ("", "v2")
    assert found[""][1] != found["v2"][1]
    for missing in ("owner/name@v3", "owner/other@"):
        assert "is not a local folder and config.json was not downloaded from the hub" in found[missing]
    assert done.stderr.count("Converting the weights of owner/name") == 2
