"""The paper's experiment: all ways to run experts agree, and a router replaced by itself changes nothing."""

import numpy as np
import pytest
import torch

from benchmarks import one_device, paper_speed
from benchmarks.paper_quality import LIKELIEST, best_of_three, predicted, replaced, scores
from data.models.model import load_model
from data.traces.router_tap import RouterTap
from data.traces.trace import TokenBatch
from runtime.engine.batch import ModelBatch, forward


@pytest.fixture
def small(monkeypatch):
    for module in (one_device, paper_speed):
        monkeypatch.setattr(module, "D_MODEL", 16)
        monkeypatch.setattr(module, "D_FF", 32)
    monkeypatch.setattr(paper_speed, "SEQUENCES", 4)


@torch.inference_mode()
@pytest.mark.parametrize("experts", [2, 8])
def test_every_arm_computes_what_the_model_computes(experts, small):
    torch.manual_seed(0)
    layer = paper_speed.Layer(experts, torch.empty(1))
    batch = paper_speed.draw(np.random.default_rng(0), experts, torch.empty(1))
    calls = layer.calls(batch)
    assert list(calls) == list(paper_speed.ARMS)
    expected = calls["hugging face"][0]()[batch.real]
    for name, (call, rows) in calls.items():
        assert call()[batch.real] == pytest.approx(expected, abs=1e-6), name
        assert rows >= int(batch.real.sum()), name


def test_copies_follow_the_load_and_level_it():
    copies = paper_speed.proportional(torch.tensor([90, 5, 5]), 6)
    assert copies.tolist() == [4, 1, 1]  # 22.5 tokens a copy, then 5


@torch.inference_mode()
def test_a_router_replaced_by_its_own_choice_changes_nothing_and_by_another_it_does():
    loaded = load_model("switch-mini-64")
    ids = torch.randint(5, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens = TokenBatch.of({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    batch = ModelBatch(tokens, tokens)
    with RouterTap(loaded.model, loaded.layout) as tap:
        plain = forward(loaded.model, batch)
        calls = tap.take()[: loaded.layout.num_input_layers]
    own = torch.stack([torch.nn.functional.one_hot(call.experts.long(), 64) for call, *_ in calls], 2)
    own = own * torch.stack([call.probability for call, *_ in calls], 2)[..., None]
    for route in (predicted, best_of_three):
        with replaced(loaded, own, route):
            assert forward(loaded.model, batch) == pytest.approx(plain, abs=1e-5)
        with replaced(loaded, own.roll(1, -1), route):
            other = forward(loaded.model, batch)
    assert float((other - plain).abs().max()) > 1e-2
    assert scores(plain, plain, tokens) == (1, 0)
    assert scores(-plain, plain, tokens)[0] == 0
    assert forward(loaded.model, batch) == pytest.approx(plain, abs=0)  # the routers are back


def test_the_router_chooses_among_the_likeliest_alone():
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])[None, None]
    router = torch.tensor([0.1, 0.2, 0.3, 0.9])[None, None]
    assert LIKELIEST == 3
    assert (predicted(share, router).item(), best_of_three(share, router).item()) == (0, 2)
