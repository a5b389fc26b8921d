"""The slots compute what the model's own loop computes, whatever the plan, and give the plain model back."""

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from runtime.experts import SlotExperts
from runtime.homes import contiguous_homes
from runtime.plan import ReplicationPlan
from runtime.slots import SlotWeights
from runtime.transfer import SlotTransfer
from tests.conftest import small_switch

DEVICES, REDUNDANT, EXPERTS, WIDTH = 4, 8, 8, 32


def layer(dtype: torch.dtype = torch.float32) -> SwitchTransformersExperts:
    return small_switch().to(dtype).encoder.block[1].layer[1].mlp.experts


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
    for slot in np.flatnonzero(~home.is_home_slot):
        block = slice(home.device_of(slot) * home.slots_per_device, (home.device_of(slot) + 1) * home.slots_per_device)
        free = np.setdiff1d(np.arange(-1, EXPERTS), phy2log[0, block][phy2log[0, block] >= 0])
        phy2log[0, slot] = rng.choice(free)
    return ReplicationPlan(phy2log, DEVICES)


def in_slots(plain: SwitchTransformersExperts) -> tuple[SlotExperts, SlotTransfer]:
    home = ReplicationPlan.at_home(contiguous_homes(1, EXPERTS), DEVICES, REDUNDANT)
    weights = SlotWeights(list(plain.children()), home, 0)
    return SlotExperts(weights, plain["expert_0"].act, home.phy2log[0]), SlotTransfer([weights], home)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_equals_the_models_own_loop_under_changing_plans(tokens, dtype):
    plain = layer(dtype)
    slots, transfer = in_slots(plain)
    for seed in range(8):
        inputs = routed(tokens, seed, dtype)
        expected = plain(*inputs)  # its weights are views of the home slots
        torch.testing.assert_close(slots(*inputs), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
        transfer.start(random_plan(transfer.plan, seed))
        torch.testing.assert_close(slots(*inputs), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
        slots.phy2log = transfer.commit().phy2log[0]


def test_replicas_share_the_tokens_of_a_hot_expert():
    slots, transfer = in_slots(layer())
    hidden, _, weight = routed(400, 0)
    one_hot = torch.nn.functional.one_hot(torch.zeros(400, dtype=torch.int64), EXPERTS)[:, None]
    slots(hidden, one_hot, weight)
    assert slots.device_load.tolist() == [400, 0, 0, 0]
    replicated = transfer.plan.phy2log.copy()
    replicated[0, [6, 10, 14]] = 0  # a copy of expert 0 on each other device
    transfer.start(ReplicationPlan(replicated, DEVICES))
    slots.phy2log = transfer.commit().phy2log[0]
    slots.reset()
    slots(hidden, one_hot, weight)
    assert slots.device_load.tolist() == [100, 100, 100, 100]
    assert slots.load.tolist() == [400] + [0] * 7


def test_padding_is_computed_as_ever_but_neither_counted_nor_split():
    plain = layer()
    slots, transfer = in_slots(plain)
    transfer.start(random_plan(transfer.plan, 5))
    slots.phy2log = transfer.commit().phy2log[0]
    hidden, one_hot, weight = routed(50, 1)
    slots.mask = torch.arange(50) % 3 > 0
    torch.testing.assert_close(slots(hidden, one_hot, weight), plain(hidden, one_hot, weight), rtol=0, atol=1e-5)
    assert slots.load.sum() == int(one_hot[slots.mask].sum()) == slots.device_load.sum()


def test_groups_large_and_small_split_or_not_agree_to_the_bit():
    """With one thread a row's bits depend on the size of its group only below four rows; see `ALIKE`."""
    plain = layer()
    slots, transfer = in_slots(plain)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in range(10):
            inputs = routed(int(np.random.default_rng(seed).integers(1, 90)), seed)
            assert torch.equal(slots(*inputs), plain(*inputs))
            transfer.start(random_plan(transfer.plan, seed))
            slots.phy2log = transfer.commit().phy2log[0]
    finally:
        torch.set_num_threads(threads)


def test_release_gives_the_experts_their_own_storage_bit_for_bit():
    untouched, plain = layer(), layer()
    slots, transfer = in_slots(plain)
    transfer.start(random_plan(transfer.plan, 3))
    transfer.commit()
    slots.weights.release()
    slots.weights.wi_NFD.zero_()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name)), name


def test_a_move_never_touches_a_place_in_force():
    slots, transfer = in_slots(layer())
    first = random_plan(transfer.plan, 0)
    transfer.start(first)
    transfer.commit()
    before = slots.weights.wi_NFD[torch.from_numpy(slots.weights.places)].clone()
    transfer.start(random_plan(transfer.plan, 1))
    assert torch.equal(slots.weights.wi_NFD[torch.from_numpy(slots.weights.places)], before)
