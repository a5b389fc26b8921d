"""ExpertFiles: experts equal what safetensors reads, damaged files are named; and budgets as text."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.byte_sizes import parse_bytes, show_bytes
from data.models.layout import MoELayout
from runtime.offload.expert_files import ExpertFiles, ReadCancelledError
from runtime.offload.memory import BufferPool
from tests.conftest import small_switch
from tests.helpers.budgets import stored_switch


@pytest.fixture(scope="module")
def layout():
    return MoELayout.from_model(small_switch(), "random")


@pytest.fixture(scope="module", params=["one file", "shards", "bfloat16", "float16", "float64"])
def folder(request, tmp_path_factory):
    """A small model in one file, in shards, and in other data types."""
    path = tmp_path_factory.mktemp("disk")
    model = small_switch()
    if "float" in request.param:
        model = model.to(getattr(torch, request.param))
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
    return buffer.tensors


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_expert_equals_what_safetensors_reads(folder, layout, dtype, direct):
    files = ExpertFiles(stored_switch(folder), layout, dtype, direct)
    for layer, module in enumerate(layout.modules):
        for expert in range(layout.num_experts):
            wi, wo = read(files, (layer, expert))
            prefix = f"{module}.expert_{expert}"
            assert torch.equal(wi, stored(folder, f"{prefix}.wi.weight").to(dtype))
            assert torch.equal(wo, stored(folder, f"{prefix}.wo.weight").to(dtype))
    files.close()


def test_reads_in_pieces_and_stops_between_them(folder, layout, monkeypatch):
    monkeypatch.setattr("runtime.offload.expert_files.PIECE", 4096)
    files = ExpertFiles(stored_switch(folder), layout, torch.float32)
    assert files.reader_bytes == 4096
    wi, wo = read(files, (1, 3))
    assert torch.equal(wi, stored(folder, f"{layout.modules[1]}.expert_3.wi.weight").float())
    assert torch.equal(wo, stored(folder, f"{layout.modules[1]}.expert_3.wo.weight").float())
    asked = iter([False, False, True])
    with pytest.raises(ReadCancelledError):
        read(files, (1, 3), lambda: next(asked))


def rewritten(path, change):
    """Writes a file again with another header and the same bytes of tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NAMES = [f"encoder.block.1.layer.1.mlp.experts.expert_{expert}.wi.weight" for expert in (2, 3)]
DAMAGE = {
    "another tensor's place": lambda header: header[NAMES[0]].update(data_offsets=header[NAMES[1]]["data_offsets"]),
    "shifted": lambda header: header[NAMES[0]].update(data_offsets=[n + 4 for n in header[NAMES[0]]["data_offsets"]]),
    "one byte less": lambda header: header[NAMES[0]]["data_offsets"].__setitem__(1, 1),
    "another shape": lambda header: header[NAMES[0]].update(shape=[24, 64, 1]),
    "wrong size": lambda header: header[NAMES[0]].update(shape=[9, 9]),
    "no shape": lambda header: header[NAMES[0]].pop("shape"),
    "no dtype": lambda header: header[NAMES[0]].update(dtype="X9"),
    "a hole": lambda header: header.pop(NAMES[0]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_headers_that_whole_loading_refuses_are_refused(layout, tmp_path, damage):
    small_switch().save_pretrained(tmp_path)
    files, path = stored_switch(tmp_path), tmp_path / "model.safetensors"
    rewritten(path, lambda header: None)
    ExpertFiles(files, layout, torch.float32).close()
    rewritten(path, DAMAGE[damage])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model\.safetensors"):
        ExpertFiles(files, layout, torch.float32)


def test_damaged_files_are_refused_when_opened(layout, tmp_path):
    small_switch().save_pretrained(tmp_path)
    files, path = stored_switch(tmp_path), tmp_path / "model.safetensors"
    whole = path.read_bytes()
    expected = r"model\.safetensors is no safetensors file, or damaged or cut off \(.*; download it again"
    cut = (10).to_bytes(8, "little") + b'{"a": null'
    for damaged in (whole[:-100], whole + b"more", b"not weights at all", b"", cut):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=expected):
            ExpertFiles(files, layout, torch.float32)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_cut_off_after_opening_is_named(layout, tmp_path, direct):
    small_switch().save_pretrained(tmp_path)
    files = ExpertFiles(stored_switch(tmp_path), layout, torch.float32, direct)
    os.truncate(tmp_path / "model.safetensors", 30_000)
    with pytest.raises(OSError, match=r"model\.safetensors has 30000 bytes, but \d+ are needed"):
        read(files, (1, 7))


def test_another_number_of_experts_or_dtype_is_refused(tmp_path, layout):
    small_switch(num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights named .*expert_4\.wi\.weight"):
        ExpertFiles(stored_switch(tmp_path), layout, torch.float32)
    small_switch().save_pretrained(tmp_path)
    save_file(
        {name: tensor.to(torch.uint8) for name, tensor in load_file(tmp_path / "model.safetensors").items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="stored as U8; expected one of F32, BF16, F16, F64"):
        ExpertFiles(stored_switch(tmp_path), layout, torch.float32)


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
