"""The example of docs/tiers.md, "How eviction and prefetch decide": 3 MoE layers of 4 experts, 3 buffers."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from predictor.forecast import forecast_from_load
from runtime.offload.expert_files import never
from runtime.offload.forecast_policy import ForecastPolicy
from runtime.offload.memory import BufferPool, ExpertShape
from runtime.offload.tier import EVICTION_FACTOR, EVICTION_LAYERS, Tier

PAGE = (Path(__file__).parents[3] / "docs" / "tiers.md").read_text()
LOAD = [[8, 0, 0, 0], [9, 0, 4, 0], [0, 1.5, 0, 0]]
WAIT = 10  # seconds after which a test that hangs fails


class InstantSource:
    """A lower tier that has every expert and loads it at once."""

    def __init__(self):
        self.loaded = []

    def has(self, key):
        return True

    def read(self, key, buffer, stop=never):
        self.loaded.append(key)


def policy_after_layer_0():
    policy = ForecastPolicy(3, 4)
    policy.expect(forecast_from_load(np.array(LOAD, dtype=np.float64), made_at=0, source="test"))
    policy.begin()
    policy.observe(0, [0], costs=0)
    return policy


def wait_until_loaded(tier, and_no_candidates):
    def done():
        return not (tier._running or tier._demands or (and_no_candidates and tier._candidates))

    with tier._change:
        assert tier._change.wait_for(done, WAIT)


def resident(tier):
    return {buffer.key for buffer in tier.pool.buffers if buffer.ready}


def test_the_page_has_the_forecast_and_the_next_uses():
    policy = policy_after_layer_0()
    distance_L, _, _ = policy.layer_order.distances()
    for layer, next_use_E in enumerate(policy.next_use()):
        assert f"| {layer} | " + " | ".join(f"{load:g}" for load in LOAD[layer]) + " |" in PAGE
        row = (
            f"| {layer} | {distance_L[layer]:.0f} | " + " | ".join(f"{next_use:.1f}" for next_use in next_use_E) + " |"
        )
        assert row in PAGE
    assert policy.prefetch_candidates() == [(1, 0), (1, 2), (2, 1)]
    assert policy.current()[1, 2] == pytest.approx(0.80, abs=0.005)
    assert policy.frequency_LE[0].tolist() == pytest.approx([0.325, 0.225, 0.225, 0.225])
    assert f"{EVICTION_FACTOR} x 3.4 + {EVICTION_LAYERS:.0f} = 6.1" in PAGE


def test_the_tier_prefetches_and_evicts_as_the_page_says():
    source = InstantSource()
    pool = BufferPool(ExpertShape(((2, 3), (3, 2)), torch.float32), 3, torch.device("cpu"))
    with closing(Tier("test", pool, source, loaders=1)) as tier:
        for key in [(0, 0), (0, 3), (1, 0)]:
            tier.request([key])
            list(tier.acquire([key]))

        policy = policy_after_layer_0()
        tier.plan(policy.next_use(), policy.prefetch_candidates())
        wait_until_loaded(tier, and_no_candidates=True)
        assert source.loaded[3:] == [(1, 2)]  # step 1; and not (2, 1), which is step 2
        assert resident(tier) == {(0, 0), (1, 0), (1, 2)}

        needed, hits = [(1, 0), (1, 2), (1, 3)], tier.stats.hits
        tier.request(needed)
        policy.observe(1, [0, 2, 3], costs=0)
        tier.plan(policy.next_use(), policy.prefetch_candidates())
        wait_until_loaded(tier, and_no_candidates=False)
        assert tier.stats.hits - hits == 2
        assert source.loaded[4:] == [(1, 3)]  # step 3
        assert resident(tier) == set(needed)

        next_use_LE = policy.next_use()
        assert next_use_LE[1, [0, 2, 3]].round(1).tolist() == [10.1, 10.1, 10.1]
        assert f"(2, 1) is {next_use_LE[2, 1]:.1f} away" in PAGE
        assert policy.frequency_LE.sum(1).tolist() == pytest.approx([1.0, 1.2, 1.0])
        list(tier.acquire(needed))
        wait_until_loaded(tier, and_no_candidates=True)
        assert source.loaded[5:] == [(2, 1)]  # step 4
