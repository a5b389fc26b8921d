"""ExpertFiles in every family: an expert's bytes are those that transformers loads, however the family stores them."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from data.models.model import LoadedModel
from data.models.stored_experts import Part, puts_together, stored_experts
from data.models.weights import ModelWeights
from runtime.offload.expert_files import ExpertFiles
from runtime.offload.memory import BufferPool
from tests.helpers.families import FAMILIES, tiny

PAGES = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 4}
"""Sizes of which every matrix of an expert is whole pages in float32, as in real models."""


def open_files(folder, model, dtype=torch.float32, **how):
    layout = LoadedModel.of(model).layout
    return ExpertFiles(stored_experts(ModelWeights(str(folder)), model, layout), layout, dtype, **how)


def read(files, key):
    """An expert's tensors, read into a buffer that held other bytes."""
    buffer = BufferPool(files.shape, 1, torch.device("cpu")).buffers[0]
    buffer.storage.fill_(255)
    files.read(key, buffer)
    return buffer.tensors


def assert_equal_to_loaded(files, model, dtype=torch.float32):
    layout = LoadedModel.of(model).layout
    for layer, module in enumerate(layout.modules):
        for expert in range(layout.num_experts):
            tensors = read(files, (layer, expert))
            for name, tensor, stored in zip(
                files._stored.format.names, tensors, files._stored.read(layer, expert), strict=True
            ):
                loaded = model.get_submodule(module).get_parameter(name)[expert].to(dtype)
                assert torch.equal(tensor, loaded), (name, layer, expert)
                assert torch.equal(stored.to(dtype), loaded), (name, layer, expert)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_of_a_family_is_read_without_conversion(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = open_files(tmp_path, model)
    assert not files.converts
    assert_equal_to_loaded(files, model)
    files.close()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_another_dtype(family, stored, dtype, tmp_path):
    model = tiny(family).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    for direct in (True, False):
        files = open_files(tmp_path, model, getattr(torch, dtype), direct=direct)
        assert_equal_to_loaded(files, model, getattr(torch, dtype))
        files.close()


@pytest.mark.parametrize(("family", "spans"), [("mixtral", 2), ("qwen3_moe", 1)])
def test_gate_and_up_of_whole_pages_are_read_without_a_copy(family, spans, tmp_path, monkeypatch):
    """Mixtral's files hold the second matrix between these two, Qwen3's do not."""
    model = tiny(family, **PAGES)
    model.save_pretrained(tmp_path)
    files = open_files(tmp_path, model)
    monkeypatch.setattr(ExpertFiles, "_read_cast", None)
    monkeypatch.setattr("runtime.offload.expert_files.PIECE", 4096)
    assert [len(each) for each in files._spans[0, 0]] == [spans, 1]
    assert files._spans[0, 0][0][0].start % 4096, "a header of whole pages would hide what lies on both sides of a page"
    assert_equal_to_loaded(files, model)
    files.close()


def test_a_row_of_a_stack_is_read_alone(tmp_path):
    model = tiny("gpt_oss")
    model.save_pretrained(tmp_path)
    files = open_files(tmp_path, model)
    name = f"{LoadedModel.of(model).layout.modules[1]}.gate_up_proj"
    assert files._stored.parts(1, 5)[0] == [Part(name, 5)]
    (span,) = files._spans[1, 5][0]
    assert span.size == model.get_parameter(name)[5].nbytes
    files.close()


def test_other_conversions_are_left_to_transformers_and_logged_once(tmp_path, monkeypatch, caplog):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("data.models.stored_experts.puts_together", lambda converter: False)
    with caplog.at_level(logging.WARNING, "runtime.offload"):
        files = open_files(tmp_path, model)
        assert_equal_to_loaded(files, model)
    assert files.converts
    assert files.reader_bytes == 2 * files.shape.nbytes
    assert [
        record.getMessage().count("stores experts of a qwen3_moe model in a form") for record in caplog.records
    ] == [1]


@pytest.mark.parametrize(("sources", "operations", "expected"), [
    (["e.*.w1", "e.*.w3"], [MergeModulelist(0), Concatenate(1)], True),
    (["e.*.w2"], [MergeModulelist(0)], True),
    (["e.w1", "e.w3"], [Concatenate(1)], True),
    (["e.*.w1", "e.*.w3"], [MergeModulelist(0), Concatenate(2)], False),
    (["e.*.w2"], [MergeModulelist(1)], False),
    (["e.*.w2"], [MergeModulelist(0), Transpose(1, 2)], False),
    (["e.w13"], [Interleave(1)], False),
])  # fmt: skip
def test_which_conversions_only_put_parts_together(sources, operations, expected):
    assert puts_together(WeightConverter(sources, "e.w", operations)) is expected


@pytest.mark.parametrize(("drop", "expected"), [
    ("experts.3.up_proj", r"stores 7 experts of model.layers.0.mlp.experts.gate_up_proj, not expert 3; its files are"),
    ("up_proj", r"gate_proj.weight has shape \[24, 32\], expected \[48, 32\]"),
])  # fmt: skip
def test_files_that_lack_an_expert(drop, expected, tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if drop not in name}, path)
    with pytest.raises(ValueError, match=expected):
        open_files(tmp_path, model)


def test_experts_of_another_shape(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path)
    together = (
        r"w1.weight has shape \[48, 32\] and .*w3.weight has shape \[48, 32\], expected \[32, 32\] when put together"
    )
    with pytest.raises(ValueError, match=together):
        open_files(tmp_path, tiny("mixtral", intermediate_size=16))
    with pytest.raises(ValueError, match=r"stores 8 experts of .*, not expert 8"):
        open_files(tmp_path, tiny("mixtral", num_experts=9, num_local_experts=9))
    tiny("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj has shape \[8, 32, 96\], and no row 8"):
        open_files(tmp_path, tiny("gpt_oss", num_experts=9, num_local_experts=9))
