"""Families beside Switch on pretended devices: the plain model's outputs, and what a layer asks of a GPU.

A layer takes 20 kernels beside those of its gate, which is code of transformers. Biases take 7 more, and router weights
in the dtype of the hidden states one fewer.
"""

import copy

import pytest
import torch

from data.models.model import LoadedModel
from runtime.engine.engine import Engine
from tests.helpers.cuda_models import on_cuda
from tests.helpers.families import tiny
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner
from tests.runtime.engine.test_families import left_padded, right_padded, stream

FAMILIES = ("mixtral", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("devices", [1, 4])
def test_outputs_equal_the_plain_models(counts, family, devices):
    model = tiny(family)
    loaded, plain = LoadedModel.of(model), copy.deepcopy(model)
    prompt = left_padded(right_padded((7, 3, 5), 5))
    settings = {"attention_mask": prompt.mask.long(), "max_new_tokens": 3, "do_sample": False}
    expected = plain.generate(prompt.input_ids, **settings)
    with Engine(on_cuda(loaded), Noise(loaded.layout), devices, 0 if devices == 1 else 8) as engine:
        engine.controller.planner = RandomPlanner(engine.home)
        for batch, output in zip(stream(), engine.run(stream()), strict=True):
            real = batch.tokens.mask
            theirs = plain(batch.tokens.input_ids, attention_mask=real.long()).logits
            torch.testing.assert_close(output.logits.cpu()[real], theirs[real], rtol=0, atol=1e-4)
        assert torch.equal(engine.generate(prompt.input_ids, **settings).cpu(), expected)


@pytest.mark.parametrize(("family", "devices", "waits", "kernels"), [
    ("mixtral", 1, 0, 20), ("gpt_oss", 1, 0, 26), ("mixtral", 4, 1, None),
])  # fmt: skip
def test_how_often_the_host_waits_in_a_layer(counts, family, devices, waits, kernels):
    loaded = LoadedModel.of(tiny(family))
    calls = 3 * loaded.layout.num_layers
    with Engine(on_cuda(loaded, torch.bfloat16), None, devices, 0) as engine:
        list(engine.run(stream()[:1]))
        counts.reset()
        list(engine.run(stream()[:3]))
        assert counts.total("sync", site="runtime/") == waits * calls, str(counts)
        if kernels is not None:
            assert counts.total("kernel", site="runtime/experts/") == kernels * calls, str(counts)
