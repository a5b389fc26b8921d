"""Under any plan, slots compute what the model's own loop over experts computes."""

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from data.models.expert import ExpertFormat
from data.models.layout import MoELayout
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.experts.grouped_mm import ExpertFunction, measure_overhead
from runtime.experts.layer import ReplicatedExperts
from runtime.experts.slots import ResidentSlots
from runtime.experts.transfer import WeightTransfer
from runtime.experts.weights import ModuleWeights
from tests.conftest import small_switch

DEVICES, REDUNDANT, EXPERTS, WIDTH = 4, 8, 8, 32


def routed(tokens: int, seed: int, dtype: torch.dtype = torch.float32):
    """Hidden states, a one-hot with one token in five dropped, and router weights."""
    torch.manual_seed(seed)
    expert = torch.randint(EXPERTS, (tokens,)) ** 2 // EXPERTS
    one_hot = torch.nn.functional.one_hot(expert, EXPERTS) * (torch.rand(tokens, 1) > 0.2)
    return torch.randn(tokens, WIDTH, dtype=dtype), one_hot[:, None], torch.rand(tokens, 1, dtype=dtype)


def random_plan(home: ReplicationPlan, seed: int) -> ReplicationPlan:
    """Replica slots filled at random, never with an expert the device already holds; some stay empty."""
    rng = np.random.default_rng(seed)
    phy2log = home.phy2log.copy()
    for slot in np.flatnonzero(~home.is_home_slot[0]):
        block = slice(home.device_of(slot) * home.slots_per_device, (home.device_of(slot) + 1) * home.slots_per_device)
        free = np.setdiff1d(np.arange(-1, EXPERTS), phy2log[0, block][phy2log[0, block] >= 0])
        phy2log[0, slot] = rng.choice(free)
    return ReplicationPlan(phy2log, DEVICES)


class SmallLayer:
    """One layer of a random model, plain and in slots."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        model = small_switch().to(dtype)
        self.plain: SwitchTransformersExperts = model.encoder.block[1].layer[1].mlp.experts
        home = ReplicationPlan.at_home(contiguous_homes(1, EXPERTS), DEVICES, REDUNDANT)
        self.source = ModuleWeights(model, MoELayout.from_model(model, "random"))
        function = ExpertFunction(ExpertFormat.plain(48, WIDTH), self.plain["expert_0"].act)
        self.slots = ResidentSlots(home, 0, range(DEVICES), function, model.shared.weight)
        self.slots.fill(self.source)
        self.layer = ReplicatedExperts(self.slots, home.phy2log[0], Ranks(), DEVICES)
        self.transfer = WeightTransfer([self.slots], home, Ranks())

    def activate(self, plan: ReplicationPlan) -> None:
        self.transfer.start(plan)
        self.layer.begin(self.transfer.commit().phy2log[0], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_equals_the_models_own_loop_under_changing_plans(tokens, dtype):
    small = SmallLayer(dtype)
    for seed in range(8):
        inputs = routed(tokens, seed, dtype)
        expected = small.plain(*inputs)  # its weights are views of the home slots
        for _ in range(2):
            torch.testing.assert_close(
                small.layer(*inputs), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2
            )
            small.activate(random_plan(small.transfer.plan, seed))


def test_replicas_share_the_tokens_of_a_hot_expert():
    small = SmallLayer()
    hidden, _, weight = routed(400, 0)
    one_hot = torch.nn.functional.one_hot(torch.zeros(400, dtype=torch.int64), EXPERTS)[:, None]
    small.layer(hidden, one_hot, weight)
    assert small.layer.counters.device_load.tolist() == [400, 0, 0, 0]
    replicated = small.transfer.plan.phy2log.copy()
    replicated[0, [6, 10, 14]] = 0  # a copy of expert 0 on each other device
    small.activate(ReplicationPlan(replicated, DEVICES))
    small.layer(hidden, one_hot, weight)
    assert small.layer.counters.device_load.tolist() == [100, 100, 100, 100]
    assert small.layer.counters.load.tolist() == [400] + [0] * 7


def test_a_replica_gets_no_tokens_where_its_expert_costs_more_than_it_saves():
    small = SmallLayer()
    replicated = small.transfer.plan.phy2log.copy()
    replicated[0, 6] = 0  # a copy of expert 0, which has 40 tokens, on device 1
    small.activate(ReplicationPlan(replicated, DEVICES))
    counts = np.array([[40, 0, 10, 10, 0, 0, 0, 0]])
    # device 0 takes the price + 40 without the replica; device 1, active anyway for two experts, two prices + 20
    for price, tokens in ((0, 10), (5, 5), (10, 0)):
        small.layer.expert_overhead_tokens = price
        assert small.layer.split(counts)[0, 6] == tokens
    hidden, one_hot, weight = routed(40, 0)
    torch.testing.assert_close(
        small.layer(hidden, one_hot, weight), small.plain(hidden, one_hot, weight), rtol=0, atol=1e-5
    )


def test_the_measured_price_of_an_expert_is_a_number_of_tokens():
    small = SmallLayer()
    before = small.slots.tensors[0].clone()
    for experts in small.slots.experts:
        price = measure_overhead(experts, small.layer.ranks)
        assert isinstance(price, int)
        assert 0 <= price < 64
    assert torch.equal(small.slots.tensors[0], before)


def test_rows_that_are_not_needed_are_neither_computed_nor_counted():
    small = SmallLayer()
    small.activate(random_plan(small.transfer.plan, 5))
    hidden, one_hot, weight = routed(50, 1)
    needed = torch.arange(50) % 3 > 0
    small.layer.begin_step(~needed)
    expected = small.plain(hidden, one_hot, weight) * needed[:, None]
    torch.testing.assert_close(small.layer(hidden, one_hot, weight), expected, rtol=0, atol=1e-5)
    assert small.layer.counters.load.sum() == int(one_hot[needed].sum()) == small.layer.counters.device_load.sum()


def test_groups_large_and_small_split_or_not_agree_to_the_bit():
    """With one thread a row's bits depend on the size of its group only below four rows; see `MIN_STABLE_ROWS`."""
    small = SmallLayer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in range(10):
            inputs = routed(int(np.random.default_rng(seed).integers(1, 90)), seed)
            assert torch.equal(small.layer(*inputs), small.plain(*inputs))
            small.activate(random_plan(small.transfer.plan, seed))
    finally:
        torch.set_num_threads(threads)


def test_release_gives_the_experts_their_own_storage_bit_for_bit():
    untouched, small = SmallLayer().plain, SmallLayer()
    small.activate(random_plan(small.transfer.plan, 3))
    small.source.release()
    small.slots.tensors[0].zero_()
    for name, parameter in small.plain.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name)), name


def test_after_the_end_of_a_batch_all_tokens_are_computed():
    small = SmallLayer()
    small.layer.begin(small.layer.phy2log, torch.arange(50) % 3 == 0)
    small.layer(*routed(50, 1))
    small.layer.end()
    inputs = routed(7, 2)
    torch.testing.assert_close(small.layer(*inputs), small.plain(*inputs), rtol=0, atol=1e-5)


def test_a_plan_changed_within_a_batch_keeps_counting():
    small = SmallLayer()
    inputs = routed(50, 1)
    small.layer(*inputs)
    small.transfer.start(random_plan(small.transfer.plan, 2))
    small.layer.change_plan(small.transfer.commit().phy2log[0])
    torch.testing.assert_close(small.layer(*inputs), small.plain(*inputs), rtol=0, atol=1e-5)
    assert small.layer.counters.load.sum() == 2 * inputs[1].sum() == small.layer.counters.device_load.sum()


def test_a_plain_call_records_no_gradients_and_a_backward_pass_is_refused():
    small = SmallLayer()
    hidden, one_hot, weight = routed(50, 1)
    hidden.requires_grad_()
    output = small.layer(hidden, one_hot, weight)
    torch.testing.assert_close(output, small.plain(hidden, one_hot, weight), rtol=0, atol=1e-5)
    assert output.requires_grad
    with pytest.raises(RuntimeError, match=r"experts compute no gradients; train the model outside `with Engine\("):
        output.sum().backward()


def test_training_mode_is_refused():
    small = SmallLayer()
    small.layer.train()
    with pytest.raises(RuntimeError, match=r"inference only; call model.eval\(\)"):
        small.layer(*routed(5, 0))
