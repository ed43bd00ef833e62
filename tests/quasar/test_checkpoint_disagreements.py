"""Folders whose files disagree: what transformers does with the same folder, or a refusal that names it."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibration.float_model import load_float_model
from export.build_options import BuildOptions
from export.provenance import model_section
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.config import spec_from_config
from quasar.checkpoints.rope import attention_scaling, inverse_frequencies
from quasar.errors import CheckpointError
from tests.tiny import save_tiny_model

IDS = torch.arange(40)[None]


def change(folder, drop=(), **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def same_logits(folder):
    """Our float reference and transformers' own reading of the folder, on the same ids."""
    with torch.no_grad():
        checkpoint = open_checkpoint(str(folder))
        ours = load_float_model(checkpoint)(IDS).logits
        model = AutoModelForCausalLM.from_pretrained(folder)
        theirs = model(IDS).logits
    # The same weights in the same model: sums in another memory order.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # The graph's rotary tables are made from the spec, not by transformers.
    rope, rotary = checkpoint.spec.ropes[0], model.model.rotary_emb
    np.testing.assert_allclose(inverse_frequencies(rope, checkpoint.spec.head_size), rotary.inv_freq, rtol=1e-5)
    assert attention_scaling(rope) == pytest.approx(rotary.attention_scaling)


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


def test_a_head_of_its_own_beside_tie_word_embeddings(folder, caplog):
    change(folder, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(str(folder))
    assert not checkpoint.spec.tied_head
    assert "the weights have their own" in caplog.text
    assert not checkpoint.transformers_config().tie_word_embeddings
    same_logits(folder)


def test_a_head_that_repeats_the_embedding_is_tied(folder):
    change(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(folder)).spec.tied_head
    same_logits(folder)


def test_a_head_without_an_embedding_is_both(folder):
    change(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.spec.tied_head
    np.testing.assert_array_equal(checkpoint.read("embed_tokens.weight"), head)
    same_logits(folder)


def test_an_untied_head_that_is_missing_is_named(tmp_path):
    """transformers would make up a random one."""
    folder = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    change(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(str(folder))


def test_the_model_type_alone_says_the_architecture(folder):
    change(folder, drop=("architectures",))
    assert open_checkpoint(str(folder)).spec.architecture == "llama"
    same_logits(folder)


def test_a_leftover_quantization_config_on_float_weights(folder, caplog):
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with caplog.at_level(logging.WARNING):
        model = load_float_model(open_checkpoint(str(folder)))
    assert "config.json says bitsandbytes, and the weights are float" in caplog.text
    with torch.no_grad():
        np.testing.assert_allclose(model(IDS).logits, expected.detach(), atol=1e-4)


def test_float_weights_that_are_rounded_in_every_pass_are_refused(folder):
    change(folder, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(CheckpointError, match=r"already quantized \(bitnet\)"):
        open_checkpoint(str(folder))


def test_a_quantization_config_that_is_no_object(folder):
    change(folder, quantization_config="gptq")
    with pytest.raises(CheckpointError, match="quantization_config is 'gptq'; a JSON object was expected"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("tensor", ["qweight", "weight_scale", "weight_packed", "weight.absmax", "weight._data", "W_q"])
def test_weights_that_are_quantized_are_refused(folder, tensor):
    change(folder, quantization_config={"quant_method": "hqq"})
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.0.mlp.up_proj.{tensor}"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"already quantized \(hqq\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        # As Llama 3.2: 32 times the original length is four times its context.
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            512,
        ),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.2, "mscale_all_dim": 0.7}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.2}, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_scaled_positions_reach_past_max_position_embeddings(folder, rope, context):
    change(folder, drop=("rope_scaling",), rope_parameters={**rope, "rope_theta": 1e4})
    assert open_checkpoint(str(folder)).spec.context_length == context
    same_logits(folder)


@pytest.mark.parametrize(
    "config",
    [
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "rope_parameters": None,
            "original_max_position_embeddings": 256,
        },
    ],
)
def test_rope_that_is_said_twice_is_read_in_transformers_order(folder, config):
    change(folder, **config)
    assert open_checkpoint(str(folder)).spec.ropes[0].kind != "default"
    same_logits(folder)


def test_rope_by_kind_of_layer_is_refused(folder):
    rope = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    change(folder, rope_parameters=rope)
    with pytest.raises(CheckpointError, match=r"rope parameters for some layers alone \(full_attention\)"):
        open_checkpoint(str(folder))


QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "use_sliding_window": True,
    "sliding_window": 64,
}


@pytest.mark.parametrize(
    "harmless",
    [
        {"max_window_layers": 3},
        {},
        {"sliding_window": 512, "max_window_layers": 0},
        {"layer_types": ["full_attention"] * 3},
        {"use_sliding_window": False, "max_window_layers": 0},
        {"sliding_window": None, "max_window_layers": 0},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 512},
    ],
)
def test_a_window_that_never_applies(harmless):
    assert windows_of({**QWEN2, **harmless}) == [None] * 3


def windows_of(config):
    return [layer.attention.window for layer in spec_from_config(config, {}).layers]


def test_the_window_that_transformers_takes_where_none_is_said():
    config = {name: value for name, value in QWEN2.items() if name != "sliding_window"} | {"max_window_layers": 0}
    assert windows_of(config) == [None] * 3
    assert windows_of({**config, "max_position_embeddings": 4097}) == [4096] * 3


@pytest.mark.parametrize(
    ("windowed", "windows"),
    [
        ({"max_window_layers": 1}, [None, 64, 64]),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, [None, None, 64]),
        # As long as max_position_embeddings, and shorter than the scaled context.
        (
            {"sliding_window": 512, "max_window_layers": 0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            [512] * 3,
        ),
    ],
)
def test_a_window_that_applies(windowed, windows):
    assert windows_of({**QWEN2, **windowed}) == windows


def test_a_window_that_transformers_fails_at_is_refused():
    windowed = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 512, "use_sliding_window": False}
    with pytest.raises(CheckpointError, match="sliding-window attention without a window"):
        spec_from_config({**QWEN2, **windowed}, {})


def test_another_kind_of_layer_is_named():
    with pytest.raises(CheckpointError, match="layer_types names 'chunked_attention'"):
        spec_from_config({**QWEN2, "layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, {})


def shards(folder, *parts, index=None):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for name, take in parts:
        save_file({key: weights[key] for key in take(names)}, folder / name, metadata={"format": "pt"})
    if index is not None:
        content = {"metadata": {}, "weight_map": index(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return weights


def test_an_index_that_was_left_over_from_before_a_merge(folder):
    """transformers takes model.safetensors where it is."""
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    same_logits(folder)


def test_a_tensor_that_two_shards_hold(folder):
    first, second = FIRST, SECOND
    weights = shards(
        folder,
        (first, lambda names: names),
        (second, lambda names: names[:1]),
        index=lambda names: dict.fromkeys(names, first),
    )
    name = sorted(weights)[0]
    again = {name: torch.zeros_like(weights[name]), "another": torch.zeros(1)}
    save_file(again, folder / second, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["another"] = second
    index.write_text(json.dumps(content))
    checkpoint = open_checkpoint(str(folder))
    np.testing.assert_array_equal(checkpoint.read(name.removeprefix("model.")), weights[name])
    index.unlink()
    with pytest.raises(CheckpointError, match=r"stands in model-00001-of-00002\.safetensors and in model-00002"):
        open_checkpoint(str(folder))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def halves(folder, **changes):
    """The folder as two shards with an index in which `changes` say where tensors are; None leaves one out."""

    def index(names):
        shard_of = {name: FIRST if number < len(names) // 2 else SECOND for number, name in enumerate(names)}
        shard_of |= {name.replace("__", "."): shard for name, shard in changes.items()}
        return {name: shard for name, shard in shard_of.items() if shard is not None}

    first, second = (lambda names: names[: len(names) // 2]), (lambda names: names[len(names) // 2 :])
    return shards(folder, (FIRST, first), (SECOND, second), index=index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__norm__weight": FIRST},
            rf"says that {FIRST} holds 'model\.norm\.weight', and {SECOND} does: download the folder again",
        ),
        (
            {"model__layers__1__self_attn__q_norm__weight": SECOND},
            rf"says that {SECOND} holds 'model\.layers\.1\.self_attn\.q_norm\.weight', and no shard does",
        ),
        ({"model__norm__weight": None}, rf"{SECOND} holds 'model\.norm\.weight', which .*index\.json does not name"),
    ],
)
def test_an_index_that_lies(folder, changes, message):
    halves(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_a_buffer_that_the_index_alone_names_is_passed_over(folder):
    halves(folder, model__layers__0__self_attn__rotary_emb__inv_freq=FIRST)
    same_logits(folder)


def test_an_index_names_a_tensor_that_no_shard_has(folder):
    only = "model-00001-of-00001.safetensors"
    shards(folder, (only, lambda names: names[:-1]), index=lambda names: dict.fromkeys(names, only))
    with pytest.raises(CheckpointError, match=r"holds 'model\.norm\.weight', and no shard does"):
        open_checkpoint(str(folder))


def test_shards_without_an_index_are_read_if_all_are_there(folder):
    weights = halves(folder)
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(str(folder))
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), weights["model.norm.weight"])
    (folder / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"has {SECOND}, and {FIRST} is missing: download all 2 shards"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("kept", [0, 5, 400, -1])
def test_a_shard_that_was_cut_off_is_named(folder, kept):
    halves(folder)
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{SECOND} is not a whole safetensors file .*: download it again"):
        open_checkpoint(str(folder))


def test_other_formats_beside_the_shards_are_passed_over(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    shutil.move(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert open_checkpoint(str(folder)).read("norm.weight").shape == (64,)


def test_a_folder_keeps_its_name(tmp_path):
    folder = save_tiny_model(tmp_path / "Llama-3.2-1B", "llama")
    checkpoint = open_checkpoint(str(folder))
    options = BuildOptions(model=str(folder), output=tmp_path / "engine")
    assert model_section(options, checkpoint, checkpoint.spec)["name"] == "Llama-3.2-1B"


def test_a_link_to_a_folder_keeps_its_name(folder, tmp_path):
    link = tmp_path / "Llama-3.2-1B"
    link.symlink_to(folder, target_is_directory=True)
    checkpoint = open_checkpoint(str(link))
    options = BuildOptions(model=str(link), output=tmp_path / "engine")
    assert model_section(options, checkpoint, checkpoint.spec)["name"] == "Llama-3.2-1B"
