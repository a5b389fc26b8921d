"""Within a budget every family gives the plain model's logits and text, for prompts and for steps."""

import shutil

import numpy as np
import pytest
import torch

from data.models.model import LoadedModel
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights
from predictor.baselines.history import LastBatch
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine
from runtime.offload.cache import LOADERS
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.memory import PAGE
from tests.helpers.families import FAMILIES, tiny
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner
from tests.helpers.processes import on_ranks
from tests.runtime.engine.test_families import largest_difference, left_padded, right_padded

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def save(tmp_path, switch_folder):
    """A function that writes a family's tiny model, with a tokenizer, to a folder."""

    def write(family):
        tiny(family).save_pretrained(tmp_path / family)
        shutil.copy(switch_folder / "tokenizer.json", tmp_path / family)
        return str(tmp_path / family)

    return write


def budget(folder, model, experts):
    """Bytes in which these many experts have room."""
    layout = LoadedModel.of(model).layout
    files = ExpertFiles(stored_experts(ModelWeights(folder), model, layout), layout, torch.float32)
    files.close()
    return experts * files.shape.padded_bytes + LOADERS * files.reader_bytes + PAGE


def same_text(engine, plain):
    """Whether greedy text is the plain model's, with the padding in front and behind, sequences ending one by one."""
    same = []
    for prompt in (left_padded(right_padded((7, 3, 5), 5)), right_padded((4, 4, 4), 6)):
        mask = prompt.mask.long()
        first = plain.generate(prompt.input_ids, attention_mask=mask, **SETTINGS)
        settings = SETTINGS | {"eos_token_id": int(first[0, -4])}
        expected = plain.generate(prompt.input_ids, attention_mask=mask, **settings)
        ids = engine.generate(prompt.input_ids, attention_mask=mask, replan_every=3, **settings)
        own = expected[ModelBatch(prompt).rows(engine.ranks.rank, engine.ranks.world)]
        width = ids.shape[1]
        same.append(torch.equal(ids, own[:, :width]) and not own[:, width:].any())
    return all(same)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_text_are_the_plain_models(family, save):
    folder, plain = save(family), tiny(family)
    layout = LoadedModel.of(plain).layout
    quarter = layout.num_layers * layout.num_experts // 4
    for experts in (quarter, layout.experts_per_token, 1):
        with Engine(folder, LastBatch(), device_memory=budget(folder, plain, experts)) as engine:
            for forecaster in (LastBatch(), Noise(layout)):
                engine.controller.forecaster = forecaster
                assert largest_difference(engine, plain) <= 1e-5
            assert same_text(engine, plain)
            (tier,) = engine.replicated.cache.tiers
            assert len(tier.pool.buffers) == experts
            assert tier.stats.misses > 0
            assert not tier.stats.failed


def test_a_tier_of_host_memory_below(save):
    folder, plain = save("gpt_oss"), tiny("gpt_oss")
    device, host = (budget(folder, plain, experts) for experts in (3, 9))
    with Engine(folder, LastBatch(), device_memory=device, host_memory=host) as engine:
        assert largest_difference(engine, plain) <= 1e-5
        assert same_text(engine, plain)
        assert engine.replicated.cache.tiers[1].stats.demands > 0


def outputs(rank, folder, family, experts):
    """Differences from the plain model, with replicas at random places."""
    plain = tiny(family)
    with Engine(folder, LastBatch(), num_redundant_experts=4, device_memory=budget(folder, plain, experts)) as engine:
        found = {"last": largest_difference(engine, plain)}
        engine.controller.planner = RandomPlanner(engine.home)
        found["random"] = largest_difference(engine, plain)
        return found | {"text": same_text(engine, plain), "misses": engine.replicated.cache.tiers[0].stats.misses}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_two_ranks_with_a_budget_each(family, save):
    for found in on_ranks(2, outputs, save(family), family, 3):
        assert isinstance(found, dict), found
        assert max(found["last"], found["random"]) <= 1e-5
        assert found["text"]
        assert found["misses"] > 20


def test_a_step_loads_what_its_tokens_need_and_a_repeated_step_nothing(save):
    folder, plain = save("qwen3_moe"), tiny("qwen3_moe")
    layout = LoadedModel.of(plain).layout
    everything = budget(folder, plain, layout.num_layers * layout.num_experts)
    with Engine(folder, device_memory=everything) as engine:
        one = ModelBatch(right_padded((1,), 0))
        (first,) = engine.run([one])
        loaded = engine.replicated.cache.loads
        assert first.stats.load.sum() == layout.num_layers * layout.experts_per_token
        assert loaded == np.count_nonzero(first.stats.load) == layout.num_layers * layout.experts_per_token
        list(engine.run([one]))
        assert engine.replicated.cache.loads == loaded


def test_a_budget_below_one_expert(save):
    folder, plain = save("mixtral"), tiny("mixtral")
    least = budget(folder, plain, 1)
    with pytest.raises(ValueError, match=rf"device_memory is .* too little for one expert, .* at least {least} bytes"):
        Engine(folder, device_memory=least - 1).__enter__()
