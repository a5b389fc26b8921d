"""Whatever form a checkpoint has, logits and text are the plain model's: whole, within a budget, on two ranks."""

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, SwitchTransformersForConditionalGeneration

from data.traces.trace import pad_tokens
from predictor.baselines.history import LastBatch
from runtime.engine.batch import ModelBatch, forward
from runtime.engine.engine import Engine
from tests.conftest import small_switch
from tests.helpers.checkpoints import as_aliased, as_dtype, as_pickled
from tests.helpers.families import tiny
from tests.helpers.forecasters import Noise
from tests.helpers.processes import on_ranks

FORMS = {
    "bin": as_pickled,
    "sharded bin": lambda folder: as_pickled(folder, 3),
    "fp16": lambda folder: as_dtype(folder, torch.float16),
    "fp16 bin": lambda folder: as_pickled(as_dtype(folder, torch.float16)),
    "alias": lambda folder: as_aliased(folder, small_switch()),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHCAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(cache, switch_folder, tmp_path):
    """A Switch model in every form."""
    return {name: str(make(shutil.copytree(switch_folder, tmp_path / name))) for name, make in FORMS.items()}


def batches() -> list[ModelBatch]:
    generator = torch.Generator().manual_seed(0)

    def rows(sizes: list[int]):
        return pad_tokens([torch.randint(3, 400, (size,), generator=generator).numpy() for size in sizes], 0)

    return [ModelBatch(rows([21, 7, 30]), rows([5, 9, 3])), ModelBatch(rows([3, 40]), rows([8, 8]))]


def differences(engine: Engine, plain) -> list[float]:
    """Largest difference of this rank's logits in each batch, and 0 or 1 for its greedy text."""
    found = []
    for batch, output in zip(batches(), engine.run(batches()), strict=True):
        real = batch.decoder.mask[output.rows]
        found.append(float((output.logits[real] - forward(plain, batch)[output.rows][real]).abs().max()))
    tokens = batches()[0].tokens
    settings = {"attention_mask": tokens.mask.long(), "max_new_tokens": 8}
    expected = plain.generate(tokens.input_ids, **settings)
    written = engine.generate(tokens.input_ids, replan_every=3, **settings)
    own = ModelBatch(tokens).rows(engine.ranks.rank, engine.ranks.world)
    return [*found, float(not torch.equal(written, expected[own, : written.shape[1]]))]


def plain_model(folder: str):
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("budget", [None, "200KiB"])
def test_one_process(folders, budget):
    for name, folder in folders.items():
        with Engine(folder, LastBatch(), None, None if budget else 8, device_memory=budget) as engine:
            assert max(differences(engine, plain_model(folder))) <= 1e-5, name


def on_rank(rank: int, folders: dict[str, str], budget: str | None, cache: str) -> dict[str, list[float]]:
    os.environ["SWITCHCAST_CACHE"] = cache
    found = {}
    for name, folder in folders.items():
        with Engine(folder, LastBatch(), None, 4, device_memory=budget) as engine:
            found[name] = differences(engine, plain_model(folder))
    return found


@pytest.mark.parametrize("budget", [None, "200KiB"])
def test_two_ranks(folders, budget, tmp_path):
    for result in on_ranks(2, on_rank, folders, budget, str(tmp_path / "cache")):
        assert isinstance(result, dict), result
        for name, found in result.items():
            assert max(found) <= 1e-5, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_families_that_stack_their_experts(cache, tmp_path, switch_folder, family):
    folder = tmp_path / family
    tiny(family).save_pretrained(folder)
    shutil.copy(switch_folder / "tokenizer.json", folder)
    as_pickled(as_dtype(folder, torch.float16), 2)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    ids = torch.arange(3, 60).view(3, 19)
    expected = plain(ids).logits
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    for budget in (None, "100KiB"):
        with Engine(str(folder), None, device_memory=budget) as engine:
            (output,) = engine.run([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
            torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
            assert torch.equal(engine.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("shape", [(33, 49), (30, 50), (31, 17)])
@pytest.mark.parametrize("devices", [1, 4])
def test_widths_that_are_no_multiple_of_16_bytes(shape, devices):
    d_model, d_ff = shape
    plain, model = (small_switch(d_model=d_model, d_ff=d_ff) for _ in range(2))
    with Engine(model, Noise(Engine(model).loaded.layout), devices, 8 if devices > 1 else 0) as engine:
        assert max(differences(engine, plain)) <= 1e-5


def test_widths_of_decoder_only_models():
    widths = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "moe_intermediate_size": 21}
    plain, model = tiny("qwen3_moe", **widths), tiny("qwen3_moe", **widths)
    ids = torch.arange(3, 60).view(3, 19)
    for devices in (1, 4):
        with Engine(model, None, devices, 8 if devices > 1 else 0) as engine:
            (output,) = engine.run([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
            torch.testing.assert_close(output.logits, plain(ids).logits, rtol=0, atol=1e-5)
