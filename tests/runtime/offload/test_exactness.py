"""Outputs of offloaded experts equal the unmodified model's: every policy, several budgets, random evictions."""

import os
import threading

import numpy as np
import pytest
import torch

from benchmarks.support.policies import CosinePolicy, LastBatchPolicy, LfuPolicy, OraclePolicy
from data.models.layout import MoELayout
from data.models.model import LoadedModel, load_dense, load_model
from data.traces.trace import pad_tokens
from predictor.baselines.history import LastBatch
from runtime.balancing.plan import ReplicationPlan, contiguous_homes
from runtime.distributed.ranks import Ranks
from runtime.engine.adapter import needed_positions
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.model import ReplicatedModel
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.forecast_policy import ForecastPolicy, LruFallback
from runtime.offload.memory import PAGE
from runtime.offload.policy import LruPolicy, NextUsePolicy
from tests.helpers.budgets import stored_switch


class Random(NextUsePolicy):
    """Evicts and prefetches experts at random."""

    def __init__(self, layers, experts):
        super().__init__(layers, experts)
        self.rng = np.random.default_rng(0)

    def next_use(self):
        return self.rng.uniform(0, 9, self.frequency_LE.shape)

    def prefetch_candidates(self):
        layers, experts = self.frequency_LE.shape
        keys = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        return [keys[index] for index in self.rng.permutation(len(keys))]


def oracle_without_passes(layers, experts):
    return OraclePolicy(np.zeros((1, layers, experts), dtype=bool))


def random_with_fallback(layers, experts):
    return LruFallback(Random(layers, experts), layers, experts, buffers=3)


POLICIES = [
    LruPolicy,
    LfuPolicy,
    NextUsePolicy,
    LastBatchPolicy,
    CosinePolicy,
    ForecastPolicy,
    Random,
    oracle_without_passes,
    random_with_fallback,
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(switch_folder):
    return load_model(str(switch_folder))


def batches(count=5):
    """Batches of sequences of unequal length, long enough to exceed the expert capacity of 6."""
    rng = np.random.default_rng(0)

    def rows(size, longest):
        return pad_tokens([rng.integers(3, 400, rng.integers(1, longest)) for _ in range(size)], pad=0)

    return [ModelBatch(rows(size, 60), rows(size, 20)) for size in rng.integers(1, 6, count)]


def open_files(folder, layout: MoELayout, direct=True):
    return ExpertFiles(stored_switch(folder), layout, torch.float32, direct)


def replicated_over(switch, cache):
    home = contiguous_homes(switch.layout.num_layers, switch.layout.num_experts)
    return ReplicatedModel(switch, ReplicationPlan.at_home(home, 1, 0), Ranks(), cache)


def offloaded(folder, share, policy=LruPolicy, host_share=None):
    """A model whose cache holds a share of the experts: the loaded model, its MoE layers and the cache."""
    switch: LoadedModel = load_dense(str(folder))
    layout, files = switch.layout, open_files(folder, switch.layout)
    whole, reserve = len(files) * files.shape.padded_bytes, LOADERS * files.reader_bytes
    device = int(share * whole) + PAGE + (reserve if host_share is None else 0)
    host = None if host_share is None else int(host_share * whole) + PAGE + reserve
    cache = ExpertCache(files, policy(layout.num_layers, layout.num_experts), device, host)
    return switch, replicated_over(switch, cache).layers, cache


def assert_same_outputs(plain, switch, cache):
    for number, batch in enumerate(batches()):
        history = np.ones((number + 1, switch.layout.num_layers, switch.layout.num_experts), dtype=np.int64)
        cache.expect(LastBatch().forecast(None, history))
        cache.begin()
        # not equal to the bit: some kernels sum in an order that depends on the alignment of the matrix in memory
        torch.testing.assert_close(forward(switch.model, batch), forward(plain.model, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.07, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_outputs_equal_the_unmodified_models(switch_folder, plain, policy, share):
    switch, _, cache = offloaded(switch_folder, share, policy)
    with cache:
        tier = cache.tiers[0]
        assert len(tier.pool.buffers) == int(share * 16)
        assert_same_outputs(plain, switch, cache)
        assert tier.stats.peak_bytes <= share * 16 * tier.pool.shape.padded_bytes
        if share < 0.5 and policy is LruPolicy:
            assert tier.stats.misses > 50


def test_outputs_are_equal_with_a_tier_of_host_memory(switch_folder, plain):
    switch, _, cache = offloaded(switch_folder, 0.13, Random, host_share=0.4)
    with cache:
        assert [len(tier.pool.buffers) for tier in cache.tiers] == [2, 6]
        assert_same_outputs(plain, switch, cache)
        device, host = (tier.stats for tier in cache.tiers)
        assert host.hits + host.late + host.misses >= device.demands
        assert 0 < cache.loads == host.demands + host.prefetches


def test_padding_after_the_last_token_loads_no_experts(switch_folder, plain):
    switch, (encoder, _), cache = offloaded(switch_folder, 1.0)
    ids = torch.zeros(2, 30, dtype=torch.int64)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 3:5] = mask[1, :2] = True  # padding before, between and after tokens
    ids[mask] = torch.tensor([7, 9, 9, 7])
    needed = needed_positions(mask).reshape(-1)
    assert needed.sum() == 7
    encoder.begin_step(~needed)
    with cache, torch.inference_mode():
        ours = switch.model.encoder(input_ids=ids, attention_mask=mask.long())[0]
        theirs = plain.model.encoder(input_ids=ids, attention_mask=mask.long())[0]
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=1e-5)
        few = cache.loads
        encoder.begin_step(torch.ones_like(needed))
        switch.model.encoder(input_ids=ids, attention_mask=mask.long())
        assert cache.loads == few <= 7


def test_greedy_text_is_identical(switch_folder, plain):
    switch, _, cache = offloaded(switch_folder, 0.2, ForecastPolicy)
    tokens = batches(1)[0].tokens
    settings = {"input_ids": tokens.input_ids, "attention_mask": tokens.mask.long(), "max_new_tokens": 12}
    with cache:
        assert torch.equal(switch.model.generate(**settings), plain.model.generate(**settings))


def test_two_caches_read_one_folder_at_the_same_time(switch_folder, plain):
    first, second = offloaded(switch_folder, 0.2, Random), offloaded(switch_folder, 0.1)
    failures = []

    def run(switch, cache):
        try:
            with torch.inference_mode():
                assert_same_outputs(plain, switch, cache)
        except BaseException as error:
            failures.append(error)

    with first[2], second[2]:
        threads = [threading.Thread(target=run, args=(switch, cache)) for switch, _, cache in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_damaged_file_fails_the_batch_and_is_named(tmp_path, plain):
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    switch = load_dense(str(tmp_path))
    first, other = batches(2)
    with ExpertCache.open(stored_switch(tmp_path), switch.layout, torch.float32, "1MiB") as cache:
        replicated_over(switch, cache)
        short = ModelBatch(pad_tokens([first.tokens.input_ids[0, :2].numpy()], pad=0))
        torch.testing.assert_close(forward(switch.model, short), forward(plain.model, short), rtol=0, atol=1e-5)
        os.truncate(tmp_path / "model.safetensors", 20_000)
        with pytest.raises(OSError, match=r"model\.safetensors has 20000 bytes, but \d+ are needed"):
            forward(switch.model, other)
        torch.testing.assert_close(forward(switch.model, short), forward(plain.model, short), rtol=0, atol=1e-5)
        report = cache.report()
        assert report["device"]["failed"] > 0
        assert (report["policy"], report["fallbacks"]) == ("forecast", 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_are_equal_on_a_gpu_while_experts_are_evicted(switch_folder, plain):
    switch = load_dense(str(switch_folder))
    layout, files = switch.layout, open_files(switch_folder, switch.layout)
    policy, expert = Random(layout.num_layers, layout.num_experts), files.shape.padded_bytes
    switch.model.to("cuda")
    with ExpertCache(files, policy, 5 * expert, 9 * expert + LOADERS * files.reader_bytes, "cuda") as cache:
        replicated_over(switch, cache)
        for batch in batches():
            cache.begin()
            real = batch.decoder.mask
            ours, theirs = forward(switch.model, batch).cpu()[real], forward(plain.model, batch)[real]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
