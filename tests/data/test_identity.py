"""A trace is of one model: fine-tuned with frozen routers it is another; traces of earlier versions are still known."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.collect import collect
from data.models.layout import MoELayout
from data.text.batching import BatchingConfig
from data.traces.recordings import TRACE_JSON
from data.traces.store import open_trace
from tests.conftest import TEXTS

BATCHING = BatchingConfig(batches=2, smallest=2, largest=4, length=24)


@pytest.fixture
def traced(switch_folder, tmp_path):
    """Collects the trace of a model folder."""
    folder, text = shutil.copytree(switch_folder, tmp_path / "model"), tmp_path / "words.txt"
    text.write_text("\n".join(TEXTS))

    def collected():
        return collect(str(folder), tmp_path / "trace", str(text), batching=BATCHING)

    collected()
    return folder, collected


def test_a_model_that_was_fine_tuned_in_place_with_frozen_routers_is_refused(traced):
    folder, collected = traced
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    tuned = {name: each if "router" in name else each + 0.05 * torch.randn_like(each) for name, each in tensors.items()}
    save_file(tuned, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds another trace \(different model\)"):
        collected()


def test_a_trace_without_the_digest_of_dense_weights_is_reused(traced, capsys):
    _, collected = traced
    path = collected().path / TRACE_JSON
    about = json.loads(path.read_text())
    assert about["layout"]["dense"]
    earlier = {key: value for key, value in about["layout"].items() if key not in ("dense", "fingerprint")}
    about["layout"] = MoELayout(**earlier).to_json()
    assert "dense" not in about["layout"]
    path.write_text(json.dumps(about))
    capsys.readouterr()
    assert open_trace(path.parent).layout.dense == ""
    collected()
    assert "Reusing the trace" in capsys.readouterr().err
