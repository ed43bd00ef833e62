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
from export.model_section import model_section
from export.options import BuildOptions
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.config import spec_from_config
from quasar.checkpoints.gguf_file import GgufFile
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
        ours = load_float_model(open_checkpoint(str(folder)))(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    # The same weights in the same model: sums in another memory order.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


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


@pytest.mark.parametrize("tensor", ["qweight", "weight_scale", "weight_packed"])
def test_weights_that_are_quantized_are_refused(folder, tensor):
    change(folder, quantization_config={"quant_method": "gptq"})
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.0.mlp.up_proj.{tensor}"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1024),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_scaled_positions_reach_past_max_position_embeddings(folder, rope, context):
    change(folder, drop=("rope_scaling",), rope_parameters={**rope, "rope_theta": 1e4})
    assert open_checkpoint(str(folder)).spec.context_length == context
    same_logits(folder)


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
    ],
)
def test_a_window_that_never_applies(harmless):
    assert spec_from_config({**QWEN2, **harmless}, {}).num_layers == 3


@pytest.mark.parametrize(
    "windowed", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}]
)
def test_a_window_that_applies_is_refused(windowed):
    with pytest.raises(CheckpointError, match="sliding-window attention"):
        spec_from_config({**QWEN2, **windowed}, {})


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
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weights = shards(
        folder,
        (first, lambda names: names),
        (second, lambda names: names[:1]),
        index=lambda names: dict.fromkeys(names, first),
    )
    name = sorted(weights)[0]
    save_file({name: torch.zeros_like(weights[name])}, folder / second, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["another"] = second
    index.write_text(json.dumps(content))
    checkpoint = open_checkpoint(str(folder))
    np.testing.assert_array_equal(checkpoint.read(name.removeprefix("model.")), weights[name])
    index.unlink()
    with pytest.raises(CheckpointError, match=r"stands in model-00001-of-00002\.safetensors and in model-00002"):
        open_checkpoint(str(folder))


def test_an_index_names_a_tensor_that_no_shard_has(folder):
    only = "model-00001-of-00001.safetensors"
    shards(folder, (only, lambda names: names[:-1]), index=lambda names: dict.fromkeys(names, only))
    with pytest.raises(CheckpointError, match="is missing from the safetensors weights"):
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


@pytest.mark.parametrize("name", ["model.GGUF", "model", "sha256-0123"])
def test_gguf_files_by_any_name(tmp_path, name):
    shutil.copy(open_checkpoint("smollm2").location, tmp_path / name)
    assert isinstance(open_checkpoint(str(tmp_path / name)), GgufFile)


def split(source, folder, counts, *, total=None):
    """A GGUF file in parts, as llama-gguf-split writes them."""
    import gguf

    reader = gguf.GGUFReader(source)
    tensors = list(reader.tensors)
    for number, count in enumerate(counts):
        path = folder / f"m-{number + 1:05d}-of-{len(counts):05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind = field.types[0]
                sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(counts))
        writer.add_int32("split.tensors.count", len(tensors) if total is None else total)
        start = sum(counts[:number])
        for tensor in tensors[start : start + count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def test_split_gguf_files_are_one_model(tmp_path):
    whole = open_checkpoint("smollm2")
    split(whole.location, tmp_path, [100, 172])
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        parts = open_checkpoint(str(tmp_path / name))
        assert parts.location.name == "m-00001-of-00002.gguf"
        assert len(parts.files) == 2
        assert parts.spec == whole.spec
        assert parts.text().tokenizer.to_str() == whole.text().tokenizer.to_str()
        for tensor in ("embed_tokens.weight", "layers.29.mlp.down_proj.weight"):
            np.testing.assert_array_equal(parts.read(tensor), whole.read(tensor))
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"one of 2 parts, and .*m-00002-of-00002\.gguf is missing"):
        open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match=r"has 2 parts, and 1 are named so"):
        open_checkpoint(str(tmp_path / "elsewhere.gguf"))


def test_parts_that_lack_tensors(tmp_path):
    split(open_checkpoint("smollm2").location, tmp_path, [100, 172], total=273)
    with pytest.raises(CheckpointError, match="hold 272 tensors, the header says 273"):
        open_checkpoint(str(tmp_path / "m-00001-of-00002.gguf"))
