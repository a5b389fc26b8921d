"""ExpertCache: files that are cut off while in use, and budgets that are too small."""

import os
import threading

import pytest
import torch

from data.models.layout import MoELayout
from runtime.offload.cache import LOADERS, ExpertCache
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.memory import PAGE
from runtime.offload.policy import LruPolicy
from tests.conftest import small_switch
from tests.helpers.budgets import stored_switch


@pytest.fixture
def cache_and_cut(tmp_path):
    """A cache that holds all experts of a model, and a function that truncates the model's file."""
    small_switch().save_pretrained(tmp_path)
    layout = MoELayout.from_model(small_switch(), "random")
    cache = ExpertCache(ExpertFiles(stored_switch(tmp_path), layout, torch.float32), LruPolicy(2, 8), 1 << 20)
    yield cache, lambda: os.truncate(tmp_path / "model.safetensors", 30_000)
    cache.close()


def test_a_file_cut_off_while_in_use_fails_only_the_experts_to_be_read(cache_and_cut):
    cache, cut_off = cache_and_cut
    resident = {expert: [tensor.clone() for tensor in tensors] for expert, tensors in cache.use(1, [0, 1])}
    cut_off()
    with pytest.raises(OSError, match=r"model\.safetensors has 30000 bytes, but \d+ are needed; it is cut off"):
        list(cache.use(1, [0, 5, 6, 7]))
    for expert, tensors in cache.use(1, [0, 1]):
        assert all(map(torch.equal, tensors, resident[expert]))


def test_a_budget_below_one_expert_is_refused_with_the_smallest_that_works(tmp_path):
    small_switch().save_pretrained(tmp_path)
    layout, stored = MoELayout.from_model(small_switch(), "random"), stored_switch(tmp_path)

    def open_cache(**budgets):
        files = ExpertFiles(stored, layout, torch.float32)
        least = files.shape.padded_bytes + LOADERS * files.reader_bytes + PAGE
        cache = ExpertCache(files, LruPolicy(2, 8), **{name: least + extra for name, extra in budgets.items()})
        return cache, least

    with pytest.raises(
        ValueError, match=r"device_memory is .* too little for one expert, which takes 24\.0 KiB"
    ) as refused:
        open_cache(device_memory=-1)
    cache, least = open_cache(device_memory=0)
    assert f"give at least {least} bytes" in str(refused.value)
    with cache:
        assert len(cache.tiers[0].pool.buffers) == 1
        assert [expert for expert, _ in cache.use(0, [3, 5, 1])] == [3, 5, 1]
    with pytest.raises(ValueError, match="host_memory is"):
        open_cache(device_memory=0, host_memory=-1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("switchcast-host")]
