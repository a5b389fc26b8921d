"""Models load from folders of the hub's format, sharded and in bf16 too, and what is incomplete is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data.models.layout import MoELayout
from data.models.model import LoadedModel, check_model, load_dense, load_model
from data.models.weights import BUNDLED, ModelWeights, read_embedding
from data.pretrain.grouped_experts import group_experts, ungroup_experts
from tests.conftest import small_switch
from tests.data.models.test_registered import small_qwen3


@pytest.fixture
def folder(switch_folder, tmp_path):
    return shutil.copytree(switch_folder, tmp_path / "model")


def test_sharded_bf16_checkpoint(switch_folder, folder):
    (folder / "model.safetensors").unlink()
    small_switch().to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    whole, sharded = load_model(str(switch_folder)), load_model(str(folder))
    assert sharded.layout.fingerprint() == whole.layout.fingerprint()
    assert sharded.model.dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert torch.equal(read_embedding(str(folder)), sharded.model.shared.weight)


def test_bundled_model_is_what_its_card_says():
    switch = load_model(BUNDLED)
    assert switch.layout.num_experts == 64
    assert switch.layout.layer_names == ["encoder_1", "encoder_3", "decoder_1", "decoder_3"]
    assert torch.equal(read_embedding(BUNDLED), switch.model.shared.weight)
    ids = switch.tokenizer("Der Präsident sagt: def main():", return_tensors="pt")["input_ids"]
    assert switch.tokenizer.decode(ids[0]) == "Der Präsident sagt: def main():"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loads_without_its_experts(dtype):
    whole, dense = load_model(BUNDLED, dtype=dtype), load_dense(BUNDLED, dtype=dtype)
    ours, theirs = dense.model.state_dict(), whole.model.state_dict()
    assert list(ours) == [name for name in theirs if ".experts." not in name]
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())
    assert dense.model.lm_head.weight is dense.model.shared.weight
    assert dense.layout == whole.layout
    assert dense.model.generation_config.to_dict() == whole.model.generation_config.to_dict()


def test_dense_weights_that_are_missing_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.1.mlp.router.classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*first encoder.block.1.*router"):
        load_dense(str(folder))
    with pytest.raises(ValueError, match="has no weights named nonsense"):
        ModelWeights(str(folder)).read("nonsense")


def test_missing_weights_are_not_filled_with_random_ones(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .* first encoder.block.1.*expert_3.wi"):
        load_model(str(folder))


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(str(folder))
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read"):
        read_embedding(str(folder))


def test_old_transformers_are_refused(folder, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"transformers 5.17.0 records wrong router logits .*>=5.18"):
        check_model(str(folder))


def test_folders_that_hold_no_model_with_experts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="is a t5 model; expected switch_transformers, or a decoder-only"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds a list of 1, expected a JSON object"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"nonsense is not a folder; .* .switch-mini-64. or .qwen3-mini-64., a local"):
        load_model("nonsense")


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer.json or spiece.model .*\); copy"):
            load(str(folder))


@pytest.mark.parametrize("index", ["[1]", '{"weight_map": null}', '{"weight_map": {"shared.weight": 3}}'])
def test_a_damaged_index_of_shards(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read"):
        ModelWeights(str(folder))


def test_configurations_that_make_no_model(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"d_model": "wide"}, {"dense_act_fn": "nope"}):
        (folder / "config.json").write_text(json.dumps(config | change))
        for load in (load_model, load_dense):
            with pytest.raises(ValueError, match="could not be loaded"):
                load(str(folder))


def test_grouped_experts_train_like_the_models_own():
    """Loss and gradients of the model's own loop, and weights that find their way back."""
    plain, grouped = small_switch(), small_switch()
    batch = {"input_ids": torch.randint(3, 400, (4, 30)), "labels": torch.randint(3, 400, (4, 12))}
    originals = group_experts(grouped)
    losses = [model(**batch, output_router_logits=True).loss for model in (plain, grouped)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    name = "encoder.block.1.layer.1.mlp.experts"
    own = torch.stack([expert.wi.weight.grad for expert in plain.get_submodule(name).children()])
    torch.testing.assert_close(grouped.get_submodule(name).wi_EDF.grad.transpose(1, 2), own)
    with torch.no_grad():
        grouped.get_submodule(name).wi_EDF.mul_(2)
    ungroup_experts(grouped, originals)
    for ours, theirs in zip(grouped.get_submodule(name).children(), plain.get_submodule(name).children(), strict=True):
        assert torch.equal(ours.wi.weight, 2 * theirs.wi.weight)
        assert torch.equal(ours.wo.weight, theirs.wo.weight)


def test_a_live_model_is_wrapped_as_it_is():
    model = small_switch()
    switch = LoadedModel.of(model, "its tokenizer")
    assert switch.model is model
    assert switch.tokenizer == "its tokenizer"
    assert switch.layout == MoELayout.from_model(model, "SwitchTransformersForConditionalGeneration")


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"is in training mode, .*; call model.eval\(\) first$"):
        LoadedModel.of(small_switch().train())


def test_a_live_model_keeps_the_name_it_was_loaded_by(switch_folder):
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(switch_folder)
    assert LoadedModel.of(model).layout == load_model(str(switch_folder)).layout
    assert LoadedModel.of(model).tokenizer is None


def test_live_objects_that_are_no_model_with_a_head_are_refused():
    encoder = transformers.SwitchTransformersEncoderModel(small_switch().config)
    for wrong in (encoder, small_qwen3().model, torch.nn.Linear(2, 2), "google/switch-base-8"):
        expected = f"^got a {type(wrong).__name__}, expected a SwitchTransformersForConditionalGeneration, or a "
        with pytest.raises(TypeError, match=expected):
            LoadedModel.of(wrong)


@pytest.fixture
def qwen3_folder(tmp_path, switch_folder):
    """A decoder-only model in the hub's format, which stores one tensor for each expert and matrix."""
    folder = tmp_path / "qwen3"
    small_qwen3(vocab_size=400).save_pretrained(folder)
    shutil.copy(switch_folder / "tokenizer.json", folder)
    return folder


def test_a_decoder_only_model_loads_with_and_without_its_experts(qwen3_folder):
    whole, dense = load_model(str(qwen3_folder)), load_dense(str(qwen3_folder))
    live = LoadedModel.of(small_qwen3(vocab_size=400))
    assert whole.layout.fingerprint() == dense.layout.fingerprint() == live.layout.fingerprint()
    assert type(dense.model) is type(whole.model)
    theirs = whole.model.state_dict()
    for name, value in dense.model.state_dict().items():
        assert value.is_meta == (".experts." in name), name
        assert value.shape == theirs[name].shape
        assert value.is_meta or torch.equal(value, theirs[name])
    ids = torch.arange(10)[None]
    assert torch.equal(whole.model(input_ids=ids).logits, live.model(input_ids=ids).logits)
    assert torch.equal(read_embedding(str(qwen3_folder)), whole.model.get_input_embeddings().weight)
    assert load_dense(str(qwen3_folder), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama4_text"}, r"is a llama4_text model, .*: its router weights scale the input"),
        ({"model_type": "dbrx"}, r"is a dbrx model, which Switchcast cannot run: its experts are blocks of its own"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"has quantised weights \(mxfp4\), .* copy of the model"),
        ({"num_experts_per_tok": 9}, r"sends a token to 9 of 8 experts; expected 1 to all of them"),
        ({"decoder_sparse_step": 5}, r"is a qwen3_moe model without experts that Switchcast can run"),
        ({"hidden_size": "wide"}, r"could not be loaded"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_run_are_refused_before_weights_are_read(qwen3_folder, changes, expected):
    config = json.loads((qwen3_folder / "config.json").read_text())
    (qwen3_folder / "config.json").write_text(json.dumps(config | changes))
    (qwen3_folder / "model.safetensors").unlink()
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=expected):
            load(str(qwen3_folder))


def test_an_expert_that_is_missing_is_named(qwen3_folder):
    weights = load_file(qwen3_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, qwen3_folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_model, load_dense):
        with pytest.raises(ValueError, match=r"lacks 1 weights .*, first model.norm.weight"):
            load(str(qwen3_folder))
    save_file({"other": weights["lm_head.weight"]}, qwen3_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no token embedding table under a known name \(shared.weight, model.embed_"):
        read_embedding(str(qwen3_folder))
