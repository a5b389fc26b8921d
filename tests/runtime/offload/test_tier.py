"""What a tier does in which order, with a source that the test opens and shuts: no sleeping, no guessing."""

import logging
import os
import threading

import numpy as np
import pytest
import torch

from data.models.layout import MoELayout
from data.models.switch import load_dense
from data.models.weights import ModelWeights
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles, ReadCancelledError, never
from runtime.offload.memory import PAGE, BufferPool, ExpertShape
from runtime.offload.policy import LastBatchPolicy, LruPolicy
from runtime.offload.slots import install
from runtime.offload.tier import Tier
from tests.conftest import small_switch

WAIT = 10  # seconds until a test that hangs fails


class Gate:
    """A source whose every read waits until the test lets that expert through; an expert's weights are its number."""

    def __init__(self):
        self.begun, self.open, self.broken = [], set(), set()
        self.change = threading.Condition()

    def has(self, key):
        return True

    def read(self, key, place, stop=never):
        with self.change:
            self.begun.append(key)
            self.change.notify_all()
            while key not in self.open:
                if stop():
                    raise ReadCancelledError
                self.change.wait(0.01)
            if key in self.broken:
                raise OSError(f"weights of {key} cannot be read")
        place.wi.fill_(key[1])
        place.wo.fill_(key[1])

    def let(self, *keys):
        with self.change:
            self.open.update(keys)
            self.change.notify_all()

    def wait_for(self, *keys):
        """Until exactly these reads have begun, in this order."""
        with self.change:
            assert self.change.wait_for(lambda: len(self.begun) >= len(keys), WAIT), self.begun
            assert self.begun == list(keys)


def key(expert):
    return 0, expert


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def make(gate):
    """Makes tiers over the gate, and closes them."""
    made = []

    def make(places, loaders=1):
        made.append(
            Tier("test", BufferPool(ExpertShape(2, 3, torch.float32), places, torch.device("cpu")), gate, loaders)
        )
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def use(tier, *experts):
    """Takes experts and says which came, checking that each had its own weights."""
    keys, came = [key(expert) for expert in experts], []
    tier.request(keys)
    for place in tier.acquire(keys):
        assert (place.wi == place.key[1]).all()
        assert (place.wo == place.key[1]).all()
        came.append(place.key[1])
    return came


def settle(tier):
    """Until nothing is being loaded."""
    with tier._change:
        assert tier._change.wait_for(lambda: not tier._loading, WAIT)


def test_what_is_there_comes_first(make, gate):
    tier = make(4)
    gate.let(key(2))
    use(tier, 2)
    keys = [key(1), key(2)]
    tier.request(keys)
    places = tier.acquire(keys)
    assert next(places).key == key(2)  # 1 has not been let through
    gate.let(key(1))
    assert next(places).key == key(1)
    assert (tier.stats.hits, tier.stats.late, tier.stats.misses) == (1, 0, 2)
    assert tier.stats.demand_bytes == 2 * 48


def test_wishes_are_fetched_in_order_and_demands_before_them(make, gate):
    tier = make(8)
    tier.plan(np.zeros((1, 8)), [key(5), key(3), key(4)])
    gate.wait_for(key(5))
    tier.request([key(7)])
    gate.let(*map(key, range(8)))
    assert [place.key for place in tier.acquire([key(7)])] == [key(7)]
    gate.wait_for(key(5), key(7), key(3), key(4))
    settle(tier)
    assert use(tier, 3) == [3]
    assert (tier.stats.useful_prefetches, tier.stats.hits) == (1, 1)


def test_a_prefetch_never_evicts_what_is_due_sooner_or_hardly_later(make, gate):
    gate.let(*map(key, range(8)))
    tier = make(2)
    use(tier, 0, 1)
    due = np.array([[1.0, 6.0, 3.0, 9.0, 5.5]])
    tier.plan(due, [key(3), key(4), key(2)])  # they would evict 1: it is due before 3, hardly after 4, well after 2
    gate.wait_for(key(0), key(1), key(2))
    settle(tier)
    assert [tier.has(key(expert)) for expert in range(5)] == [True, False, True, False, False]
    use(tier, 3)  # on demand: 2 goes, as it is due last; it was fetched for nothing
    assert [tier.has(key(expert)) for expert in range(4)] == [True, False, False, True]
    assert (tier.stats.prefetches, tier.stats.wasted_prefetches, tier.stats.precision) == (1, 1, 0.0)


def test_a_wanted_expert_is_not_evicted_by_others(make, gate):
    gate.let(*map(key, range(8)))
    tier = make(1)
    keys = [key(0), key(1)]
    tier.request(keys)
    places = tier.acquire(keys)
    first = next(places)
    tier.plan(np.array([[9.0, 0.0, 0.0]]), [key(2)])
    gate.wait_for(key(0))  # nothing else has begun: there is one place, and it is in use
    assert (first.wi == first.key[1]).all()
    assert next(places).key == key(1)


def test_a_stale_prefetch_gives_way_to_a_demand(make, gate):
    tier = make(4)
    tier.plan(np.zeros((1, 8)), [key(5)])
    gate.wait_for(key(5))
    gate.let(key(6))
    tier.plan(np.zeros((1, 8)), [])
    assert use(tier, 6) == [6]  # 5 is never let through
    assert tier.stats.cancelled == 1
    assert not tier.has(key(5))


def test_a_prefetch_on_its_way_is_waited_for_not_loaded_twice(make, gate):
    tier = make(4)
    tier.plan(np.zeros((1, 8)), [key(5)])
    gate.wait_for(key(5))
    tier.request([key(5)])
    gate.let(key(5))
    assert [place.key for place in tier.acquire([key(5)])] == [key(5)]
    assert (tier.stats.late, tier.stats.misses, tier.stats.prefetches, tier.loads) == (1, 0, 1, 1)
    assert tier.stats.stall_ms > 0
    assert 0 <= tier.stats.hidden < 1


def test_loading_time_counts_while_loads_go_on_without_a_break(make, gate):
    tier = make(4)
    gate.let(key(1))
    tier.plan(np.zeros((1, 8)), [key(1), key(2)])
    gate.wait_for(key(1), key(2))  # 2 has taken over at once and is not let through
    assert tier.has(key(1))
    assert tier.stats.load_ms > 0


def test_a_failed_load_reaches_who_waits_and_nobody_else(make, gate, caplog):
    tier = make(4)
    gate.let(*map(key, range(8)))
    gate.broken.add(key(3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tier.plan(np.zeros((1, 8)), [key(3), key(2)])
            with tier._change:
                assert tier._change.wait_for(lambda: not tier._candidates and not tier._loading, WAIT)
    assert [record.message for record in caplog.records] == [
        "expert (0, 3) could not be fetched ahead: weights of (0, 3) cannot be read"
    ]
    with pytest.raises(OSError, match=r"weights of \(0, 3\) cannot be read"):
        use(tier, 3, 1)
    assert use(tier, 2, 1) == [2, 1]
    gate.broken.clear()
    assert use(tier, 3) == [3]


def test_closing_ends_loads_and_whoever_waits(make, gate):
    tier, ended = make(4, loaders=2), []

    def wait():
        try:
            use(tier, 1, 2)
        except RuntimeError as error:
            ended.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    with gate.change:
        assert gate.change.wait_for(lambda: len(gate.begun) == 2, WAIT)
    tier.close()
    waiting.join(WAIT)
    assert ended == ["the test tier was closed while experts were waited for"]
    assert tier.pool.nbytes == 0
    assert not any(thread.is_alive() for thread in tier._threads)


def test_giving_up_in_the_middle_leaves_nothing_wanted(make, gate):
    gate.let(*map(key, range(8)))
    tier = make(2)
    keys = [key(0), key(1)]
    tier.request(keys)
    places = tier.acquire(keys)
    next(places)
    places.close()
    assert not tier._pinned
    assert use(tier, 4, 5, 6) == [4, 5, 6]


@pytest.fixture
def cut(tmp_path):
    """A model folder, its cache with room for all, and a function that cuts its file off."""
    small_switch().save_pretrained(tmp_path)
    files = ModelWeights(str(tmp_path)).files
    layout = MoELayout.from_model(small_switch(), "random")
    cache = ExpertCache(ExpertFiles(files, layout, torch.float32), LruPolicy(2, 8), 1 << 20)
    yield cache, lambda: os.truncate(tmp_path / "model.safetensors", 30_000)
    cache.close()


def test_a_file_cut_off_midway_fails_the_batch_with_its_name_and_nothing_else(cut):
    cache, cut_off = cut
    resident = {expert: (wi.clone(), wo.clone()) for expert, wi, wo in cache.use(1, [0, 1])}
    cut_off()
    with pytest.raises(OSError, match=r"model\.safetensors has 30000 bytes where \d+ are needed; it was cut off"):
        list(cache.use(1, [0, 5, 6, 7]))
    for expert, wi, wo in cache.use(1, [0, 1]):
        assert torch.equal(wi, resident[expert][0])
        assert torch.equal(wo, resident[expert][1])


def test_a_budget_below_one_expert_is_refused_with_the_least_that_works(switch_folder):
    switch = load_dense(str(switch_folder))
    layout, kept = switch.layout, ModelWeights(str(switch_folder)).files

    def open_cache(**budgets):
        files = ExpertFiles(kept, layout, torch.float32)
        least = 2 * files.shape.room + LOADERS * files.reader_bytes + PAGE
        cache = ExpertCache(files, LastBatchPolicy(2, 8), **{name: least + extra for name, extra in budgets.items()})
        return cache, least

    with pytest.raises(
        ValueError, match=r"device_memory is .* too little for one token's expert: 24\.0 KiB"
    ) as refused:
        open_cache(device_memory=-1)
    cache, least = open_cache(device_memory=0)
    assert f"give at least {least} bytes" in str(refused.value)
    with cache:
        install(switch.model, layout, cache)
        ids = torch.tensor([[7, 8, 9, 1]])
        assert switch.model.generate(input_ids=ids, max_new_tokens=3).shape[0] == 1
        assert len(cache.tiers[0].pool.places) == 1
    with pytest.raises(ValueError, match="host_memory is"):
        open_cache(device_memory=0, host_memory=-1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("switchcast-host")]
