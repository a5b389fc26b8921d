"""K experts a token: slots compute what a plain loop over tokens and experts computes, under any plan.

Formats are those of `ExpertFormat`: with and without a gate, transposed, with biases, of sides that grouped products
refuse.
"""

import copy

import numpy as np
import pytest
import torch

from data.models.expert import ExpertFormat
from data.models.model import LoadedModel
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.engine.engine import Engine
from runtime.experts.grouped_mm import ExpertFunction
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from tests.helpers.families import tiny
from tests.runtime.experts.test_layer import SmallLayer, random_plan, routed

DEVICES, REDUNDANT, EXPERTS = 4, 8, 8


def gate(both: torch.Tensor) -> torch.Tensor:
    first, second = both.chunk(2, -1)
    return torch.nn.functional.silu(first) * second


def function_of(width: int, inner: int, gated: bool, transposed: bool, biased: bool) -> ExpertFunction:
    first, second = (inner * (1 + gated), width), (width, inner)
    shapes = [side[::-1] if transposed else side for side in (first, second)]
    if biased:
        shapes += [first[:1], second[:1]]
    names = ("first", "second", "first_bias", "second_bias")[: len(shapes)]
    return ExpertFunction(ExpertFormat(names, tuple(shapes), transposed, gated), gate if gated else torch.relu)


def plain_loop(function: ExpertFunction, tensors, hidden, index, weight) -> torch.Tensor:
    """One token and one expert after the other, in float64."""
    output = torch.zeros_like(hidden, dtype=torch.float64)
    for token, chosen in enumerate(index.tolist()):
        for place, expert in enumerate(chosen):
            first, second, *biases = function.ready([tensor[expert].double() for tensor in tensors])
            inner = hidden[token].double() @ first + (biases[0] if biases else 0)
            outer = function.between(inner) @ second + (biases[1] if biases else 0)
            output[token] += outer * weight[token, place].double()
    return output


def choices(tokens: int, k: int, seed: int) -> torch.Tensor:
    """K different experts of each token, some of them hot."""
    noise = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.linspace(0, 1, EXPERTS)).topk(k).indices


@pytest.mark.parametrize(("width", "gated", "transposed", "biased"), [
    (32, True, False, False), (32, False, False, False), (32, True, True, True), (32, False, False, True),
    (30, True, False, False), (30, True, True, True),
])  # fmt: skip
@pytest.mark.parametrize("k", [1, 3, 8])
def test_slots_equal_a_plain_loop_under_changing_plans(k, width, gated, transposed, biased):
    function = function_of(width, 20, gated, transposed, biased)
    for devices, redundant in ((DEVICES, REDUNDANT), (1, 0)):
        home = ReplicationPlan.at_home(contiguous_homes(1, EXPERTS), devices, redundant)
        slots = ResidentSlots(home, 0, range(devices), function, torch.empty(1))
        torch.manual_seed(0)
        whole = [torch.randn(EXPERTS, *shape) * 0.3 for shape in function.format.shapes]
        for tensor, stack in zip(slots.tensors, whole, strict=True):
            for slot in np.flatnonzero(home.is_home_slot):
                tensor[slots.active_buffers[slot]] = stack[home.phy2log[0, slot]]
        layer = ReplicatedExperts(slots, home.phy2log[0], Ranks(), devices)
        for tokens in (1, 6, 70):
            if redundant:
                plan = random_plan(home, tokens)
                for slot in np.flatnonzero(~home.is_home_slot & (plan.phy2log[0] >= 0)):
                    for tensor, stack in zip(slots.standby(slot), whole, strict=True):
                        tensor.copy_(stack[plan.phy2log[0, slot]])
                    slots.commit([slot])
                layer.begin(plan.phy2log[0], None)
            else:
                layer.begin(home.phy2log[0], None)
            hidden, weight, index = torch.randn(tokens, width), torch.rand(tokens, k), choices(tokens, k, tokens)
            expected = plain_loop(function, whole, hidden, index, weight)
            for skipped in (None, torch.arange(tokens) % 3 == 1):
                layer.begin_step(skipped)
                wanted = expected if skipped is None else expected * ~skipped[:, None]
                found = layer.compute(hidden, index, weight, training=False)
                torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
            computed = k * (tokens + int((torch.arange(tokens) % 3 != 1).sum()))
            assert layer.counters.load.sum() == layer.counters.device_load.sum() == computed


def test_one_expert_given_by_its_number_is_computed_to_the_bit_as_one_given_by_a_one_hot():
    small = SmallLayer()
    for seed in range(4):
        hidden, one_hot, weight = routed(50 + seed, seed)
        one_hot[:, 0] = torch.nn.functional.one_hot(one_hot[:, 0].argmax(-1), EXPERTS)  # nothing dropped
        by_number = small.layer.compute(hidden, one_hot[:, 0].argmax(-1, keepdim=True), weight, training=False)
        assert torch.equal(small.layer(hidden, one_hot, weight), by_number)
        small.activate(random_plan(small.transfer.plan, seed))


def test_sums_in_bfloat16_are_as_precise_as_the_router_weights():
    """Weights in float32, as of DeepSeek-V3: their products are added up in float32, as transformers does."""
    model = tiny("qwen3_moe").bfloat16()
    experts = model.model.layers[0].mlp.experts
    hidden, index, weight = torch.randn(40, 32).bfloat16(), choices(40, 3, 0), torch.rand(40, 3)
    experts.config._experts_implementation = "grouped_mm"
    expected = experts(hidden, index, weight)
    with Engine(LoadedModel.of(model), None, 1):
        assert torch.equal(experts(hidden, index, weight), expected)


def test_one_device_computes_with_the_models_own_parameters():
    model = tiny("gpt_oss")
    own = model.model.layers[0].mlp.experts
    with Engine(LoadedModel.of(model), None, 1) as engine:
        tensors = engine.replicated.layers[0].slots.tensors
        parameters = (own.gate_up_proj, own.down_proj, own.gate_up_proj_bias, own.down_proj_bias)
        assert [tensor.data_ptr() for tensor in tensors] == [each.data_ptr() for each in parameters]


def test_the_experts_implementation_is_set_inside_the_engine_alone():
    model = tiny("mixtral")
    ids = torch.arange(3, 12)[None]
    before, logits = model.get_experts_implementation(), model(ids).logits
    modules = dict(model.named_modules())
    with Engine(model, None, 2, 0):
        assert model.config._experts_implementation == "switchcast"
        assert dict(model.named_modules()) == modules, "no module may be replaced"
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="another engine runs this model, or one built from"):
            Engine(model, None, 2, 0).__enter__()
        with pytest.raises(RuntimeError, match=r"inference only; call model.eval\(\)"):
            model.train()(ids)
        model.eval()
        with pytest.raises(RuntimeError, match="experts compute no gradients"):
            model(ids).logits.sum().backward()
    assert model.get_experts_implementation() == before
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(RuntimeError, match=r'compute with "switchcast", and no engine runs it; call it inside'):
        copied(ids)


def test_a_model_that_shares_its_configuration_with_one_in_an_engine_computes_by_its_own_loop():
    model = tiny("mixtral")
    other = type(model)(model.config).eval()
    ids = torch.arange(3, 12)[None]
    logits, mine = other(ids).logits, model(ids).logits
    with Engine(model, None, 2, 0):
        assert torch.equal(other(ids).logits, logits)
        torch.testing.assert_close(model(ids).logits, mine, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="or one built from the same configuration object; close that one first"):
            Engine(other, None, 2, 0).__enter__()
    assert torch.equal(other(ids).logits, logits)


def test_experts_that_transformers_spreads_over_devices_are_refused():
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="was loaded with expert parallelism of transformers; load it without"):
        Engine(model)
