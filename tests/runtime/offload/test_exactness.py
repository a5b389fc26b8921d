"""Answers never change where experts do not fit: against the plain model at every budget, with random evictions."""

import os
import threading

import numpy as np
import pytest
import torch

from data.models.layout import MoELayout
from data.models.switch import LoadedSwitch, load_dense, load_switch
from data.models.weights import ModelWeights
from data.traces.trace import pad_tokens
from predictor.baselines.history import LastBatch
from runtime.engine.batch import ModelBatch, forward, needed_positions
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import PAGE
from runtime.offload.policy import CosinePolicy, LastBatchPolicy, LfuPolicy, LruPolicy, NextUsePolicy, OraclePolicy
from runtime.offload.slots import install


class Random(NextUsePolicy):
    """Evicts and fetches whatever comes to its mind."""

    def __init__(self, layers, experts):
        super().__init__(layers, experts)
        self.rng = np.random.default_rng(0)

    def next_use(self):
        return self.rng.uniform(0, 9, self.usual_LE.shape)

    def prefetch_candidates(self):
        keys = [(layer, expert) for layer in range(len(self.usual_LE)) for expert in range(self.usual_LE.shape[1])]
        return [keys[index] for index in self.rng.permutation(len(keys))]


def oracle_of_nothing(layers, experts):
    return OraclePolicy(np.zeros((1, layers, experts), dtype=bool))


def guarded(layers, experts):
    return LruFallback(Random(layers, experts), layers, experts, places=3)


POLICIES = [
    LruPolicy,
    LfuPolicy,
    NextUsePolicy,
    LastBatchPolicy,
    CosinePolicy,
    ForecastPolicy,
    Random,
    oracle_of_nothing,
    guarded,
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With more, kernels may add up rows in another order from one call to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(switch_folder):
    return load_switch(str(switch_folder))


def batches(count=5):
    """Ragged batches, long enough for tokens to drop (capacity 6 a sequence)."""
    rng = np.random.default_rng(0)

    def rows(size, longest):
        return pad_tokens([rng.integers(3, 400, rng.integers(1, longest)) for _ in range(size)], pad=0)

    return [ModelBatch(rows(size, 60), rows(size, 20)) for size in rng.integers(1, 6, count)]


def open_files(folder, layout: MoELayout, direct=True):
    return ExpertFiles(ModelWeights(str(folder)).files, layout, torch.float32, direct)


def tiered(folder, share, policy=LruPolicy, host_share=None):
    """A model with its experts under a share of their bytes: the loaded model, its layers and the cache."""
    switch: LoadedSwitch = load_dense(str(folder))
    layout, files = switch.layout, open_files(folder, switch.layout)
    whole, reserve = len(files) * 2 * files.shape.room, LOADERS * files.reader_bytes
    device = int(share * whole) + PAGE + (reserve if host_share is None else 0)
    host = None if host_share is None else int(host_share * whole) + PAGE + reserve
    cache = ExpertCache(files, policy(layout.num_layers, layout.num_experts), device, host)
    return switch, install(switch.model, layout, cache), cache


def assert_same_answers(plain, switch, cache):
    for number, batch in enumerate(batches()):
        history = np.ones((number + 1, switch.layout.num_layers, switch.layout.num_experts), dtype=np.int64)
        cache.expect(LastBatch().forecast(None, history))
        cache.begin()
        # not to the bit: how some kernels add up depends on where in memory a matrix lies
        torch.testing.assert_close(forward(switch.model, batch), forward(plain.model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.07, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_plain_models(switch_folder, plain, policy, share):
    switch, _, cache = tiered(switch_folder, share, policy)
    with cache:
        tier = cache.tiers[0]
        assert len(tier.pool.places) == int(share * 16)
        assert_same_answers(plain, switch, cache)
        assert tier.stats.peak_bytes <= share * 16 * 2 * tier.pool.shape.room
        if share < 0.5 and policy is LruPolicy:
            assert tier.stats.misses > 50


def test_the_same_with_host_memory_in_between(switch_folder, plain):
    switch, _, cache = tiered(switch_folder, 0.13, Random, host_share=0.4)
    with cache:
        assert [len(tier.pool.places) for tier in cache.tiers] == [2, 6]
        assert_same_answers(plain, switch, cache)
        device, host = (tier.stats for tier in cache.tiers)
        assert host.hits + host.late + host.misses >= device.demands
        assert 0 < cache.loads == host.demands + host.prefetches


def test_padding_after_the_last_token_fetches_nothing(switch_folder, plain):
    switch, (encoder, _), cache = tiered(switch_folder, 1.0)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 3:5] = mask[1, :2] = True  # padding before, between and after
    ids[mask] = torch.tensor([7, 9, 9, 7])
    needed = needed_positions(mask).reshape(-1)
    assert needed.sum() == 7
    encoder.begin_step(needed)
    with cache, torch.inference_mode():
        ours = switch.model.encoder(input_ids=ids, attention_mask=mask.long())[0]
        theirs = plain.model.encoder(input_ids=ids, attention_mask=mask.long())[0]
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
        few = cache.loads
        encoder.begin_step(torch.zeros_like(needed))
        switch.model.encoder(input_ids=ids, attention_mask=mask.long())
        assert cache.loads == few <= 7


def test_greedy_text_is_identical(switch_folder, plain):
    switch, _, cache = tiered(switch_folder, 0.2, ForecastPolicy)
    tokens = batches(1)[0].tokens
    settings = {"input_ids": tokens.input_ids, "attention_mask": tokens.mask.long(), "max_new_tokens": 12}
    with cache:
        assert torch.equal(switch.model.generate(**settings), plain.model.generate(**settings))


def test_two_caches_share_a_folder(switch_folder, plain):
    first, second = tiered(switch_folder, 0.2, Random), tiered(switch_folder, 0.1)
    failures = []

    def run(switch, cache):
        try:
            with torch.inference_mode():
                assert_same_answers(plain, switch, cache)
        except BaseException as error:
            failures.append(error)

    with first[2], second[2]:
        threads = [threading.Thread(target=run, args=(switch, cache)) for switch, _, cache in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_batch_fails_with_the_files_name_and_others_go_on(tmp_path, plain):
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    switch = load_dense(str(tmp_path))
    first, other = batches(2)
    with ExpertCache.open(ModelWeights(str(tmp_path)).files, switch.layout, torch.float32, "1MiB") as cache:
        install(switch.model, switch.layout, cache)
        few = ModelBatch(pad_tokens([first.tokens.input_ids[0, :2].numpy()], pad=0))
        torch.testing.assert_close(forward(switch.model, few), forward(plain.model, few), rtol=0, atol=1e-5)
        os.truncate(tmp_path / "model.safetensors", 20_000)
        with pytest.raises(OSError, match=r"model\.safetensors has 20000 bytes where \d+ are needed"):
            forward(switch.model, other)
        torch.testing.assert_close(forward(switch.model, few), forward(plain.model, few), rtol=0, atol=1e-5)
        report = cache.report()
        assert report["device"]["failed"] > 0
        assert (report["policy"], report["fallbacks"]) == ("forecast", 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_answers_stay_on_a_gpu_while_experts_come_and_go(switch_folder, plain):
    switch = load_dense(str(switch_folder))
    layout, files = switch.layout, open_files(switch_folder, switch.layout)
    policy, expert = Random(layout.num_layers, layout.num_experts), 3 * files.shape.room
    switch.model.to("cuda")
    with ExpertCache(files, policy, 3 * expert, 6 * expert + LOADERS * files.reader_bytes, "cuda") as cache:
        install(switch.model, layout, cache)
        for batch in batches():
            cache.begin()
            real = batch.decoder.mask
            ours, theirs = forward(switch.model, batch).cpu()[real], forward(plain.model, batch)[real]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
