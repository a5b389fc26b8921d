"""ExpertFiles: experts equal what safetensors reads, damaged files are named; and budgets as text."""

import os

import pytest
import torch
from safetensors import safe_open

from data.byte_sizes import parse_bytes, show_bytes
from data.models.layout import MoELayout
from data.models.weights import ModelWeights
from runtime.offload.expert_files import ExpertFiles, ReadCancelledError
from runtime.offload.memory import BufferPool
from tests.conftest import small_switch


@pytest.fixture(scope="module")
def layout():
    return MoELayout.from_model(small_switch(), "random")


@pytest.fixture(scope="module", params=["one file", "shards", "bfloat16"])
def folder(request, tmp_path_factory):
    """A small model in one file, in shards, and in bfloat16."""
    path = tmp_path_factory.mktemp("disk")
    model = small_switch()
    if request.param == "bfloat16":
        model = model.to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="60KB" if request.param == "shards" else "1GB")
    assert (len(list(path.glob("*.safetensors"))) > 2) == (request.param == "shards")
    return path


def stored(folder, name):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118
                return weights.get_tensor(name)
    raise KeyError(name)


def read(files, key, *stop):
    """An expert's matrices, read into a buffer that held other bytes."""
    buffer = BufferPool(files.shape, 1, torch.device("cpu")).buffers[0]
    buffer.storage.fill_(255)
    files.read(key, buffer, *stop)
    return buffer.wi, buffer.wo


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_equals_what_safetensors_reads(folder, layout, dtype, direct):
    files = ExpertFiles(ModelWeights(str(folder)).files, layout, dtype, direct)
    for layer, module in enumerate(layout.modules):
        for expert in range(layout.num_experts):
            wi, wo = read(files, (layer, expert))
            prefix = f"{module}.expert_{expert}"
            assert torch.equal(wi, stored(folder, f"{prefix}.wi.weight").to(dtype))
            assert torch.equal(wo, stored(folder, f"{prefix}.wo.weight").to(dtype))
    files.close()


def test_reads_in_pieces_and_stops_between_them(folder, layout, monkeypatch):
    monkeypatch.setattr("runtime.offload.expert_files.PIECE", 4096)
    files = ExpertFiles(ModelWeights(str(folder)).files, layout, torch.float32)
    assert files.reader_bytes == 4096
    wi, wo = read(files, (1, 3))
    assert torch.equal(wi, stored(folder, f"{layout.modules[1]}.expert_3.wi.weight").float())
    assert torch.equal(wo, stored(folder, f"{layout.modules[1]}.expert_3.wo.weight").float())
    asked = iter([False, False, True])
    with pytest.raises(ReadCancelledError):
        read(files, (1, 3), lambda: next(asked))


def test_damaged_files_are_refused_when_opened(layout, tmp_path):
    small_switch().save_pretrained(tmp_path)
    files, path = ModelWeights(str(tmp_path)).files, tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(
        ValueError, match=r"model\.safetensors has \d+ bytes, but its header requires \d+; it is cut off"
    ):
        ExpertFiles(files, layout, torch.float32)
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        ExpertFiles(files, layout, torch.float32)
    path.write_bytes((10).to_bytes(8, "little") + b'{"a": null')
    with pytest.raises(ValueError, match=r"model\.safetensors has a damaged safetensors header"):
        ExpertFiles(files, layout, torch.float32)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_cut_off_after_opening_is_named(layout, tmp_path, direct):
    small_switch().save_pretrained(tmp_path)
    files = ExpertFiles(ModelWeights(str(tmp_path)).files, layout, torch.float32, direct)
    os.truncate(tmp_path / "model.safetensors", 30_000)
    with pytest.raises(OSError, match=r"model\.safetensors has 30000 bytes, but \d+ are needed"):
        read(files, (1, 7))


def test_another_number_of_experts_or_dtype_is_refused(tmp_path, layout):
    small_switch(num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights named .*expert_4\.wi\.weight"):
        ExpertFiles(ModelWeights(str(tmp_path)).files, layout, torch.float32)
    small_switch().half().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stored as F16; expected one of F32, BF16"):
        ExpertFiles(ModelWeights(str(tmp_path)).files, layout, torch.float32)


def test_budgets_are_parsed_from_text():
    assert parse_bytes("2GiB") == 2 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes(4096) == parse_bytes("4096") == 4096
    assert show_bytes(parse_bytes("1.5GiB")) == "1.5 GiB"
    for wrong in ("two", "2GiBs", "-3MiB", "", "5 %"):
        with pytest.raises(ValueError, match="is not a number of bytes; write it like 2GiB"):
            parse_bytes(wrong)
    with pytest.raises(ValueError, match="'0' is 0 bytes; give a budget above 0"):
        parse_bytes("0")
