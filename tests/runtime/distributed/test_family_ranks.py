"""On two ranks families beside Switch give the plain model's logits and text, from a live model and from a folder."""

import copy
from pathlib import Path

import torch

from data.models.model import LoadedModel
from predictor.baselines.history import LastBatch
from runtime.engine.batch import ModelBatch
from runtime.engine.engine import Engine
from tests.helpers.families import FAMILIES, tiny
from tests.helpers.forecasters import Noise
from tests.helpers.planners import RandomPlanner
from tests.helpers.processes import on_ranks
from tests.runtime.engine.test_families import largest_difference, left_padded, right_padded

SETTINGS = {"max_new_tokens": 8, "do_sample": False}


def written(engine: Engine, plain, sizes: tuple[int, ...]) -> bool:
    """Whether this rank's greedy text is the plain model's, with fewer sequences than ranks, too."""
    prompt = left_padded(right_padded(sizes, 5))
    mask = prompt.mask.long()
    first = plain.generate(prompt.input_ids, attention_mask=mask, **SETTINGS)
    settings = SETTINGS | {"eos_token_id": int(first[0, -5])}
    expected = plain.generate(prompt.input_ids, attention_mask=mask, **settings)
    ids = engine.generate(prompt.input_ids, attention_mask=mask, replan_every=3, **settings)
    own = expected[ModelBatch(prompt).rows(engine.ranks.rank, engine.ranks.world)]
    width = ids.shape[1]
    return torch.equal(ids, own[:, :width]) and not own[:, width:].any()


def outputs(rank: int, folders: dict[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for family, folder in folders.items():
        model = tiny(family)
        loaded, plain = LoadedModel.of(model), copy.deepcopy(model)
        with Engine(loaded, Noise(loaded.layout), None, 6) as engine:
            engine.controller.planner = RandomPlanner(engine.home)
            found[family] = largest_difference(engine, plain)
            found[f"{family} text"] = [written(engine, plain, sizes) for sizes in ((7, 3, 5), (4,))]
        with Engine(folder, LastBatch(), None, 6) as engine:
            found[f"{family} folder"] = largest_difference(engine, plain)
            found[f"{family} sent"] = sum(int(experts.counters.sent) for experts in engine.replicated.layers)
    return found


def test_two_ranks(tmp_path, switch_folder):
    folders = {}
    for family in FAMILIES:
        folders[family] = str(tmp_path / family)
        tiny(family).save_pretrained(folders[family])
        (Path(folders[family]) / "tokenizer.json").write_bytes((switch_folder / "tokenizer.json").read_bytes())
    results = on_ranks(2, outputs, folders)
    for result in results:
        assert isinstance(result, dict), result
        for family in FAMILIES:
            assert result[family] <= 1e-5, family
            assert result[f"{family} folder"] <= 1e-5, family
            assert result[f"{family} text"] == [True, True], family
            assert result[f"{family} sent"] > 0


def different_models(rank: int) -> None:
    with Engine(tiny("qwen3_moe", num_experts_per_tok=2 + rank), None, None, 0):
        pass


def test_ranks_with_different_models_are_refused():
    assert all("ValueError: model is " in result for result in on_ranks(2, different_models))


def drawn(rank: int) -> tuple[list[list[int]], int]:
    """Texts drawn for four equal prompts, and the number that the caller's generator gives next."""
    prompt = torch.arange(3, 9).repeat(4, 1)
    with Engine(tiny("qwen3_moe"), None, None, 0) as engine:
        torch.manual_seed(0)
        ids = engine.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=6)
    return ids[:, 6:].tolist(), int(torch.randint(1000, ()))


def test_each_rank_draws_on_its_own_though_all_were_seeded_alike():
    (first, after), (second, other) = on_ranks(2, drawn)
    texts = {tuple(text) for text in first + second}
    assert len(texts) == 4, "some texts are equal"
    assert after == other, "the generators of the ranks went different ways"
