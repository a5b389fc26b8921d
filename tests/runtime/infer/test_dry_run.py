"""Sizes of real models, from their configurations alone: parameters as on their cards, bytes worked out by hand."""

import json
from pathlib import Path

import pytest
import yaml

from runtime.infer.dry_run import size_up
from tests.helpers.real_models import BILLIONS, REAL_MODELS

GIB, ROOT = 1024**3, Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    """A model folder that holds nothing but a configuration."""

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.mark.parametrize("name", REAL_MODELS)
def test_each_config_of_a_real_model_is_checked_as_far_as_it_goes(name, folder):
    options = yaml.safe_load((ROOT / f"configs/models/{name}.yaml").read_text())
    assert options.keys() <= {"model", "device", "dtype", "redundant", "device_memory", "host_memory"}
    place = folder(REAL_MODELS[name])
    found = size_up(
        place, "", None, options["dtype"], None if "device_memory" in options else 4, options.get("redundant"),
        options.get("device_memory"), options.get("host_memory"),
    )  # fmt: skip
    assert round(found["parameters"] / 1e9, 2) == pytest.approx(BILLIONS[name], abs=0.05)
    if budget := found.get("budget"):
        assert budget["host_memory"] > found["all_experts_bytes"], "host memory holds all experts"
        assert 0 < budget["resident"] * found["expert_bytes"] <= budget["device_memory"]
    else:
        plan = found["plan"]
        assert plan["home_slots"] * 4 == found["experts"]
        assert plan["replica_slots"] * 4 == options["redundant"]


def test_bytes_of_mixtral_worked_out_by_hand(folder, capsys):
    found = size_up(folder(REAL_MODELS["mixtral-8x7b"]), "", None, "bfloat16", 8, 8, None, None)
    assert found["expert_bytes"] == 3 * 4096 * 14336 * 2
    assert found["all_experts_bytes"] == 32 * 8 * found["expert_bytes"] == 84 * GIB
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert found["dense_bytes"] == 2 * (32 * (attention + 2 * 4096 + 8 * 4096) + 2 * 32000 * 4096 + 4096)
    # a home and a replica slot of two buffers in each of 32 layers
    assert found["plan"]["expert_bytes"] == 32 * 3 * found["expert_bytes"]
    printed = capsys.readouterr().out
    assert "1 home and 1 replica slots a layer: 31.5 GiB" in printed
    assert "46,703 million" in printed


def test_a_budget_below_one_expert_and_slots_that_do_not_divide_are_refused(folder):
    place = folder(REAL_MODELS["mixtral-8x7b"])
    with pytest.raises(ValueError, match=r"device_memory is 100MiB, and one expert takes 336.0 MiB"):
        size_up(place, "", None, "bfloat16", None, None, "100MiB", None)
    with pytest.raises(ValueError, match="3 devices"):
        size_up(place, "", None, "bfloat16", 3, 0, None, None)


def test_a_predictor_of_another_geometry_is_refused(folder):
    predictor = ROOT / "tests/predictor/fixtures/v1"
    with pytest.raises(
        ValueError, match=r"fixtures/v1 was trained for .*, the model is .*: family mixtral, not switch"
    ):
        size_up(folder(REAL_MODELS["mixtral-8x7b"]), "", predictor, "bfloat16", 8, 8, None, None)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_hidden_layers": 10**7}, "has num_hidden_layers 10000000 in its config.json, expected at most 2000"),
        ({"num_local_experts": 10**6}, "1000000 experts a layer, expected 1 to 32767"),
    ],
)
def test_absurd_sizes_end_at_once(folder, changes, text):
    with pytest.raises(ValueError, match=text):
        size_up(folder(REAL_MODELS["mixtral-8x7b"] | changes), "", None, "bfloat16", 8, 8, None, None)
