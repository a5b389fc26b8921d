"""A model in any form of a checkpoint is the same model; damaged, incomplete and hostile files are refused."""

import json
import os
import pickle
import shutil
import zipfile
from importlib.util import find_spec

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.files import LFS_POINTER
from data.models import pickled
from data.models.model import LoadedModel, load_dense, load_model
from data.models.stored_experts import stored_experts
from data.models.weights import ModelWeights, read_embedding
from tests.conftest import small_switch
from tests.helpers.checkpoints import as_aliased, as_dtype, as_pickled
from tests.helpers.families import tiny
from tests.helpers.processes import on_ranks


@pytest.fixture
def folder(switch_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHCAST_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(switch_folder, tmp_path / "model")


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_the_same_model(switch_folder, folder, shards):
    expected = load_model(str(switch_folder))
    as_pickled(folder, shards)
    whole, dense = load_model(str(folder)), load_dense(str(folder))
    assert whole.layout.is_same(expected.layout)
    assert dense.layout == whole.layout
    theirs = expected.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert all(torch.equal(value, theirs[name]) for name, value in dense.model.state_dict().items())
    assert dense.model.lm_head.weight is dense.model.shared.weight
    assert torch.equal(read_embedding(str(folder)), expected.model.shared.weight)
    assert not (folder.parent / "cache").exists(), "nothing of this needs a converted copy"


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_once_for_each_state_of_the_files(folder, shards, monkeypatch, capsys):
    monkeypatch.setattr(pickled, "SHARD_BYTES", 20_000)
    expected = load_file(folder / "model.safetensors")
    as_pickled(folder, shards)
    weights = ModelWeights(str(folder))
    converted = weights.as_safetensors()
    assert converted.as_safetensors() is converted
    assert converted.files.keys() == weights.files.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted.read(name), tensor), name
        assert torch.equal(converted.read_row(name, 0), tensor[0])
        assert torch.equal(weights.read_row(name, 0), tensor[0])
    assert len(set(converted.files.values())) > 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"Converting the weights of {folder}" in said
    assert ModelWeights(str(folder)).as_safetensors().files == converted.files
    assert not capsys.readouterr().err

    changed = next(iter(weights.files.values()))
    tensors = torch.load(changed, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, changed)
    name = next(iter(tensors))
    assert torch.equal(ModelWeights(str(folder)).as_safetensors().read(name), tensors[name] + 1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_experts_of_pickled_families_are_read_one_by_one(folder, tmp_path, family):
    place = tmp_path / family
    model = tiny(family)
    model.save_pretrained(place)
    shutil.copy(folder / "tokenizer.json", place)
    layout = LoadedModel.of(model).layout
    dense = load_dense(str(as_pickled(as_dtype(place, torch.bfloat16), 2)))
    stored = stored_experts(ModelWeights(str(place)), dense.model, dense.layout)
    for layer, module in enumerate(layout.modules):
        for tensor, name in zip(stored.read(layer, 5), stored.format.names, strict=True):
            assert torch.equal(tensor, model.get_submodule(module).get_parameter(name)[5].bfloat16()), name


def convert(rank: int, folder: str, cache: str) -> list[str]:
    os.environ["SWITCHCAST_CACHE"] = cache
    return sorted(map(str, set(ModelWeights(folder).as_safetensors().files.values())))


def test_processes_that_convert_at_once_wait_for_one(folder):
    as_pickled(folder)
    results = on_ranks(3, convert, str(folder), str(folder.parent / "cache"))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 1
    places = [place for place in (folder.parent / "cache" / "weights").iterdir() if place.is_dir()]
    assert len(places) == 1, "nothing half-written is left"


def test_a_conversion_that_was_killed_leaves_nothing(folder, tmp_path):
    as_pickled(folder)
    left_over = tmp_path / "cache" / "weights" / ".model-1234.abc"
    left_over.mkdir(parents=True)
    (left_over / "model-00001.safetensors").write_text("half")
    weights = ModelWeights(str(folder)).as_safetensors()
    assert [place.parent for place in set(weights.files.values())] == list((tmp_path / "cache" / "weights").iterdir())


def test_a_full_disk_leaves_no_converted_copy(folder, tmp_path, monkeypatch):
    as_pickled(folder)
    real, calls = pickled.save_file, []

    def full(shard, path, about):
        calls.append(path)
        if len(calls) == 2:
            raise SafetensorError("I/O error: No space left on device")
        real(shard, path, about)

    monkeypatch.setattr(pickled, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(pickled, "save_file", full)
    with pytest.raises(ValueError, match=r"No space left on device.*; name another folder in .* SWITCHCAST_CACHE"):
        ModelWeights(str(folder)).as_safetensors()
    assert not list((tmp_path / "cache" / "weights").iterdir())
    ModelWeights(str(folder)).as_safetensors()


def test_a_conversion_without_room_says_what_to_do(folder, tmp_path, monkeypatch):
    as_pickled(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWITCHCAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"could not be converted into .*; name another folder in .* SWITCHCAST_CACHE"):
        ModelWeights(str(folder)).as_safetensors()


def test_safetensors_are_read_where_both_are(folder):
    expected = load_file(folder / "model.safetensors")["shared.weight"]
    torch.save({"shared.weight": expected + 1}, folder / "pytorch_model.bin")
    assert torch.equal(read_embedding(str(folder)), expected)
    assert torch.equal(load_model(str(folder)).model.shared.weight, expected)


def test_a_whole_file_goes_before_an_index_as_in_transformers(folder):
    expected = load_file(folder / "model.safetensors")["shared.weight"]
    save_file({"shared.weight": expected + 1}, folder / "old.safetensors")
    index = {"weight_map": {"shared.weight": "old.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_embedding(str(folder)), expected)
    assert torch.equal(load_model(str(folder)).model.shared.weight, expected)


class Hostile:
    """An object whose pickle writes a file when it is opened unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_runs_nothing(folder, tmp_path):
    as_pickled(folder)
    torch.save({"shared.weight": torch.zeros(2), "other": Hostile(tmp_path / "ran")}, folder / "pytorch_model.bin")
    for read in (load_model, load_dense, read_embedding, ModelWeights):
        with pytest.raises(ValueError, match=r"pytorch_model.bin is no file of tensors alone; .* it is refused"):
            read(str(folder))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no file of tensors alone; .* it is refused"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def compressed(path):
    """Writes an archive's entries again, compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_damaged_pickles_are_refused(folder):
    path = as_pickled(folder) / "pytorch_model.bin"
    good = path.read_bytes()

    def refused(expected):
        with pytest.raises(ValueError, match=expected):
            load_model(str(folder))

    path.write_bytes(good[: len(good) // 2])
    refused(r"pytorch_model.bin (cannot be opened|is no file of tensors alone)")
    path.write_bytes(b"")
    refused(r"pytorch_model.bin (cannot be opened|is no file of tensors alone)")
    path.write_bytes(good)
    compressed(path)
    refused("is compressed")
    for wrong in ([torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {"a": torch.zeros(1).expand(1 << 40)}):
        torch.save(wrong, path)
        refused("holds other things than tensors by name, expected what model.state_dict")


def test_indices_that_name_other_places_or_lack_tensors_are_refused(folder):
    as_pickled(folder, 3)
    index = folder / "pytorch_model.bin.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": shards | {"shared.weight": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match=r"names the file ../elsewhere.bin, expected one beside it"):
        load_model(str(folder))
    index.write_text(json.dumps({"weight_map": shards | {"more.weight": shards["shared.weight"]}}))
    with pytest.raises(ValueError, match=r"lacks more.weight, which its index lists; download it again"):
        ModelWeights(str(folder)).as_safetensors()
    with pytest.raises(ValueError, match=r"lacks more.weight, which its index lists; download it again"):
        ModelWeights(str(folder)).read("more.weight")
    (folder / shards["shared.weight"]).unlink()
    with pytest.raises(ValueError, match=r"pytorch_model-0.*bin does not exist"):
        load_model(str(folder))


def test_a_folder_without_weights_is_told_what_is_expected(folder):
    (folder / "model.safetensors").unlink()
    for read in (load_model, load_dense, read_embedding):
        with pytest.raises(ValueError, match=r"has no weights; expected model.safetensors or .* pytorch_model.bin"):
            read(str(folder))


def test_a_tied_embedding_is_found_under_any_of_its_names(switch_folder, folder):
    expected = load_model(str(switch_folder))
    as_aliased(folder, small_switch())
    assert "shared.weight" not in load_file(folder / "model.safetensors")
    whole, dense = load_model(str(folder)), load_dense(str(folder))
    for loaded in (whole, dense):
        assert loaded.layout.is_same(expected.layout)
        assert torch.equal(loaded.model.shared.weight, expected.model.shared.weight)
        assert loaded.model.lm_head.weight is loaded.model.shared.weight
    assert torch.equal(read_embedding(str(folder)), expected.model.shared.weight)


def test_an_embedding_that_is_not_tied_is_not_taken_from_another_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    as_aliased(folder, small_switch())
    with pytest.raises(ValueError, match="no token embedding table under a known name"):
        read_embedding(str(folder))
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=r"lacks 3 weights"):
            load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_data_types_load_whole_and_without_experts(folder, dtype):
    stored = load_file(as_dtype(folder, dtype) / "model.safetensors")
    whole, dense = load_model(str(folder)), load_dense(str(folder))
    assert whole.layout == dense.layout
    for name, value in whole.model.state_dict().items():
        if name in stored:
            assert torch.equal(value, stored[name].float()), name
    assert torch.equal(read_embedding(str(folder)), stored["shared.weight"].float())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs_are_named(folder, name):
    (folder / name).write_bytes(LFS_POINTER + b"v1\noid sha256:4d7a\nsize 12345\n")
    expected = rf"{name} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {folder}"
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=expected):
            load(str(folder))


def test_a_pointer_that_is_not_needed_does_not_matter(folder):
    (folder / "pytorch_model.bin").write_bytes(LFS_POINTER + b"v1\n")
    assert load_model(str(folder)).layout.num_experts == 8


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="with sentencepiece they load")
@pytest.mark.parametrize(("name", "kind"), [("spiece.model", "T5Tokenizer"), ("tokenizer.model", "LlamaTokenizer")])
def test_a_vocabulary_that_needs_a_package_names_it(folder, name, kind):
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\n\x0e\n\x05<pad>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=r"`pip install sentencepiece`, or add the tokenizer.json"):
            load(str(folder))


def test_a_tokenizer_without_its_settings_is_named(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer could not be loaded without tokenizer_config.json; copy the"):
        load_model(str(folder))


def test_a_tokenizer_that_cannot_encode_is_refused(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": [512]}))
    with pytest.raises(ValueError, match=r"its tokenizer could not be loaded \(.*'int' and 'list'"):
        load_model(str(folder))
