"""Recorded routing: what is replayed in a model of other weights is what the bundled model's routers chose."""

import numpy as np
import pytest
import torch

from benchmarks.support.make_qwen3 import make_qwen3
from benchmarks.support.make_switch import make_switch
from benchmarks.support.recorded import play_back, record
from data.models.model import load_model
from data.text.batching import BatchingConfig
from data.traces.router_tap import RouterTap

SIZES = {
    "switch-mini-64": (make_switch, {"experts": 64, "blocks": 4, "d_model": 32, "d_ff": 16, "heads": 2}),
    "qwen3-mini-64": (make_qwen3, {"d_model": 64, "d_ff": 16, "heads": 4}),
}


@pytest.fixture(scope="module", params=SIZES)
def recorded(request, tmp_path_factory):
    """A bundled model, three of its recorded batches, and a smaller model with random weights."""
    make, sizes = SIZES[request.param]
    folder = tmp_path_factory.mktemp("model") / request.param
    make(out=folder, **sizes)
    small, batching = load_model(request.param), BatchingConfig(batches=40, smallest=2, largest=2, length=24)
    return small, record(small, batching, ["every_1"], 3, mode="generate"), load_model(str(folder))


@torch.inference_mode()
def test_generation_in_another_model_needs_the_recorded_experts(recorded):
    _, batches, other = recorded
    layout, used = other.layout, []
    routers = play_back(other.model, layout)
    for layer, name in enumerate(layout.modules):
        other.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, layer=layer: used.append((layer, args[1]))
        )
    for batch in batches:
        used.clear()
        for router in routers:
            router.begin(batch)
        steps = batch.steps(layout)
        other.model.generate(
            input_ids=batch.tokens.input_ids, attention_mask=batch.tokens.mask.long(), max_new_tokens=steps,
            min_new_tokens=steps, do_sample=False,
        )  # fmt: skip
        passes, step = list(batch.passes(layout, "generate")), [0] * layout.num_layers
        assert len(passes) == steps > 4
        for layer, choice in used:
            found = np.zeros(layout.num_experts, dtype=bool)
            chosen = choice if layout.causal else choice.flatten(0, -2).nonzero()[:, -1]
            found[chosen.flatten().long().numpy()] = True
            needed = passes[step[layer]][layer]
            if layout.causal or layer >= layout.num_input_layers:
                assert (found == needed).all(), f"layer {layer}, step {step[layer]}"
            else:  # the model computes padding too
                assert needed.any()
                assert (found >= needed).all()
            step[layer] += 1
        assert step[-1] == steps


@pytest.mark.parametrize("recorded", ["qwen3-mini-64"], indirect=True)
@torch.inference_mode()
def test_experts_of_prompts_and_of_what_is_written_are_those_of_generation_step_by_step(recorded):
    small, batches, _ = recorded
    for batch in batches:
        cache, rows = None, len(batch.tokens.mask)
        ids = torch.cat([batch.tokens.input_ids, batch.decoder.input_ids], 1)
        for step in range(batch.steps(small.layout)):
            columns = batch.columns(0, small.layout, "generate", step)
            with RouterTap(small.model, small.layout) as tap:
                cache = small.model(input_ids=ids[:, columns], past_key_values=cache, use_cache=True).past_key_values
            for layer, (call,) in enumerate(tap.take()):
                found, expected = call.experts.reshape(rows, -1, 4), batch.experts[layer][:, columns]
                assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("model", SIZES)
def test_loads_are_those_that_the_tokens_known_ahead_bring(model):
    loaded, batching = load_model(model), BatchingConfig(batches=40, smallest=2, largest=2, length=24)
    for batch in record(loaded, batching, ["every_1"], 2, mode="generate"):
        load, layout = batch.load(loaded.layout), loaded.layout
        first = next(batch.passes(layout, "generate"))[: layout.num_input_layers]
        assert ((load[: layout.num_input_layers] > 0) == first).all()
        if layout.causal:
            assert (load.sum(1) == batch.tokens.num_tokens * layout.experts_per_token).all()
