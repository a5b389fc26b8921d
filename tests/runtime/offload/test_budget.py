"""An engine with a memory budget: outputs equal the unmodified model's, alone and on several ranks."""

import numpy as np
import pytest
import torch

from data.models.model import load_model
from predictor.baselines.history import LastBatch
from predictor.forecast import forecast_from_load
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine
from tests.helpers.batches import batches, largest_difference, unusual
from tests.helpers.budgets import budget
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner
from tests.helpers.processes import on_ranks

SETTINGS = {"max_new_tokens": 12, "do_sample": False}


class Absurd(Noise):
    """Forecasts an impossible number of tokens."""

    def forecast(self, upcoming, history):
        return forecast_from_load(np.full(self.shape, 1e300), made_at=0, source=self.name)


def compare_outputs(rank: int, folder: str, experts: int) -> dict[str, object]:
    """Compares logits and greedy text with the unmodified model's; the budget holds `experts` of its 16 experts."""
    plain = load_model(folder).model
    found: dict[str, object] = {}
    with Engine(folder, num_redundant_experts=4, device_memory=budget(experts)) as engine:
        layout = engine.switch.layout
        forecasters = {"none": None, "noise": Noise(layout), "last": LastBatch(), "absurd": Absurd(layout)}
        for name, forecaster in forecasters.items():
            engine.controller.forecaster = forecaster
            found[name] = largest_difference(engine, plain, unusual())
        if engine.home.num_redundant_experts:
            engine.controller.planner = RandomPlanner(engine.home)
            found["random"] = largest_difference(engine, plain, unusual())
        tokens = batches(1)[0].tokens
        expected = plain.generate(input_ids=tokens.input_ids, attention_mask=tokens.mask.long(), **SETTINGS)
        rows = ModelBatch(tokens).rows(engine.ranks.rank, engine.ranks.world)
        ids = engine.generate(tokens, replan_every=2, **SETTINGS)
        found["text"] = torch.equal(ids, expected[rows][:, : ids.shape[1]])
        tier = engine.replicated.cache.tiers[0]
        found["buffers"] = len(tier.pool.buffers)
        found["misses"] = tier.stats.misses
    return found


@pytest.mark.parametrize(("world", "experts"), [(1, 1), (1, 4), (1, 16), (2, 2)])
def test_outputs_within_a_budget_equal_the_unmodified_models(switch_folder, world, experts):
    for found in on_ranks(world, compare_outputs, str(switch_folder), experts):
        assert isinstance(found, dict), found
        assert found.pop("text")
        assert found.pop("buffers") == experts
        assert found.pop("misses") > (0 if experts == 16 else 20)
        assert len(found) == (4 if world == 1 else 5)
        assert max(found.values()) <= 1e-5, found


def test_a_budget_below_one_expert_is_refused_with_the_smallest_that_works(switch_folder, monkeypatch):
    with pytest.raises(ValueError, match=rf"device_memory is .* too little .* give at least {budget(1)} bytes"):
        Engine(str(switch_folder), device_memory=budget(1) - 1).__enter__()
    monkeypatch.setattr("runtime.offload.memory.free_bytes", lambda: 1000.0)
    with pytest.raises(ValueError, match=r"experts need .*, but only 1000 B are free; lower the memory budget"):
        Engine(str(switch_folder), device_memory=budget(2)).__enter__()
    with pytest.raises(ValueError, match="'lots' is not a number of bytes; write it like 2GiB"):
        Engine(str(switch_folder), device_memory="lots").__enter__()
