"""What Python callers pass by mistake ends in one sentence with the argument's name, before a model is loaded."""

import pytest
import torch

from data.models.model import load_model
from runtime.engine.engine import Engine
from tests.helpers.families import tiny


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_devices": "8"}, "num_devices is '8', expected a whole number, 1 or more"),
        ({"num_devices": 2.5}, "num_devices is 2.5, expected a whole number, 1 or more"),
        ({"num_devices": True}, "num_devices is True, expected a whole number, 1 or more"),
        ({"num_devices": 0}, "num_devices is 0, expected a whole number, 1 or more"),
        ({"num_redundant_experts": -8}, "num_redundant_experts is -8, expected a whole number, 0 or more"),
        ({"max_moves": "all"}, "max_moves is 'all', expected a whole number, 0 or more"),
        ({"devices_per_node": 0}, "devices_per_node is 0, expected a whole number, 1 or more"),
        ({"num_groups": 2.5}, "num_groups is 2.5, expected a whole number, 1 or more"),
        ({"expert_overhead_tokens": "much"}, "expert_overhead_tokens is 'much', expected 0 or more, or 'auto'"),
        ({"expert_overhead_tokens": -1}, "expert_overhead_tokens is -1, expected a whole number, 0 or more"),
        ({"expert_overhead_tokens": 1.5}, "expert_overhead_tokens is 1.5, expected a whole number, 0 or more"),
        ({"device": "tpu"}, "device is 'tpu', expected 'cpu' or 'cuda'"),
        ({"host_memory": "1GiB"}, "host_memory is 1GiB without device_memory"),
        ({"device_memory": "1GiB", "num_devices": 2}, "num_devices is 2; within a budget a process is one device"),
    ],
)
def test_engine(settings, text):
    with pytest.raises(ValueError, match=text):
        Engine("no-such-model", **settings)


def test_numbers_of_numpy_and_torch_are_whole_too(switch_folder):
    for devices in (torch.tensor([4]).numpy()[0], torch.tensor(4).item()):
        assert Engine(str(switch_folder), None, devices, 0).home.num_devices == 4


def test_dtype(switch_folder):
    with pytest.raises(ValueError, match="dtype is 'float16', expected 'float32' or 'bfloat16'"):
        load_model(str(switch_folder), dtype="float16")
    with pytest.raises(ValueError, match="dtype is 'float16', expected 'float32' or 'bfloat16'"):
        Engine(str(switch_folder), dtype="float16", device_memory="1GiB")


def test_generate():
    ids = torch.arange(3, 9)[None]
    with Engine(tiny("mixtral"), None, 2, 0) as engine:
        with pytest.raises(ValueError, match=r"replan_every is 1\.5, expected a whole number, 1 or more"):
            engine.generate(ids, replan_every=1.5)
        with pytest.raises(TypeError, match="generation_config is a dict, expected a GenerationConfig"):
            engine.generate(ids, {"max_new_tokens": 3})
