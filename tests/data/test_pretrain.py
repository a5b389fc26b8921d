"""Pretraining writes a model folder that transformers and the layout reader take, for each family."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data.pretrain.__main__ as command
from data.models.registered import registered_layout
from data.pretrain import qwen3_moe, switch
from data.pretrain.recipe import Recipe, learning_rate
from data.text.corpus import SEGMENTS
from data.text.document import Document
from tests.conftest import TEXTS

SMALL = Recipe(steps=2, sequences=2, length=16)


@pytest.fixture
def few_texts(monkeypatch):
    """A corpus of a few sentences in every segment."""
    documents = [Document(segment, text) for segment in SEGMENTS for text in TEXTS * 3]
    monkeypatch.setattr(command, "offline_corpus", lambda part: iter(documents))
    for family in (switch, qwen3_moe):
        monkeypatch.setattr(family, "VOCABULARY", 400)


@pytest.mark.parametrize("family", ["switch", "qwen3_moe"])
def test_a_model_folder_appears_whole(family, few_texts, tmp_path, capsys):
    folder = tmp_path / "mini"
    command.pretrain(family, folder, SMALL, "cpu")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    facts = json.loads((folder / "training.json").read_text())
    assert printed["held_out_loss"] == facts["held_out_loss"] > 0
    assert [step for step, _ in facts["loss_curve"]] == [2]
    assert AutoConfig.from_pretrained(folder).num_experts == 64
    assert AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]
    assert f"--family {family}" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="exists"):
        command.pretrain(family, folder, SMALL, "cpu")


def test_the_decoder_only_model_routes_each_token_to_four_experts(few_texts, tmp_path):
    command.pretrain("qwen3_moe", tmp_path / "mini", SMALL, "cpu")
    layout = registered_layout(AutoModelForCausalLM.from_pretrained(tmp_path / "mini"), "mini")
    assert (layout.num_layers, layout.num_experts, layout.experts_per_token) == (4, 64, 4)


def test_the_learning_rate_rises_and_falls_to_zero():
    recipe = Recipe(steps=100, peak_lr=1.0)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates.index(max(rates)) in (4, 5)
    assert rates[-1] < 0.001
