"""Checkpoints: configs read and refused by name, shards, GGUF against transformers' own reader."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from calibration.float_model import load_float_model
from quasar.checkpoints import Rope, open_checkpoint
from quasar.checkpoints.checkpoint import read_float32
from quasar.checkpoints.config import decoder_config, spec_from_config
from quasar.checkpoints.rope import attention_scaling, cos_sin_tables, inverse_frequencies
from quasar.checkpoints.sources import resolve
from quasar.errors import CheckpointError
from tests.tiny import save_tiny_model, tiny_config, tiny_config_json, tiny_torch_model
from tests.tiny_gguf import add_sizes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def test_config_of_both_generations_means_the_same():
    old = spec_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, {})
    new = spec_from_config({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, {})
    assert old == new
    assert old.ropes[0] == Rope(theta=5e5, kind="linear", factor=4.0)
    assert old.num_kv_heads == 4


def test_end_ids_come_from_the_generation_config():
    assert spec_from_config({**LLAMA, "eos_token_id": 2}, {}).eos_token_ids == (2,)
    assert spec_from_config({**LLAMA, "eos_token_id": 2}, {"eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    assert spec_from_config(LLAMA, {}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unsupported architecture: GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "unsupported architecture: model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, "sliding-window attention"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "unsupported rope scaling 'ntk'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "64"}, "hidden_size is '64'; a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "mistral"}, "model_type is 'mistral', but LlamaForCausalLM is named"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 kv heads evenly"),
        ({"head_dim": 100}, "unsupported head size 100: rotary attention in ONNX Runtime takes multiples of 16"),
        ({"head_dim": -4}, "unsupported head size -4"),
        ({"num_key_value_heads": "two"}, "config.json holds a value of the wrong kind"),
        ({"rope_scaling": "linear"}, "config.json holds a value of the wrong kind"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "config.json holds a value of the wrong kind"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "the rope scaling does not fit"),
        ({"rms_norm_eps": None}, "config.json holds a value of the wrong kind"),
        ({"eos_token_id": "</s>"}, "config.json holds a value of the wrong kind"),
        ({"architectures": 5}, "config.json holds a value of the wrong kind"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        spec_from_config({**LLAMA, **change}, {})


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.1,
            "truncate": False,
        },
    ],
)
def test_rotary_tables_are_those_of_transformers(parameters):
    config = tiny_config("llama", head_dim=64, max_position_embeddings=131072, rope_parameters=parameters)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(3000)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    spec = spec_from_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, {})
    ours = cos_sin_tables(spec.ropes[0], 64, 3000)
    # Angles up to 3000 in float32 carry 1e-4; a unit in the last place of a frequency shows there.
    np.testing.assert_allclose(ours[0], cos[0, :, :32].numpy(), atol=5e-4)
    np.testing.assert_allclose(ours[1], sin[0, :, :32].numpy(), atol=5e-4)


@pytest.mark.parametrize("length", [64, 65])
def test_longrope_tables_are_those_of_transformers(length):
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0 + pair / 4 for pair in range(8)],
        "long_factor": [1.0 + pair for pair in range(8)],
    }
    config = tiny_config("phi3", original_max_position_embeddings=64, rope_scaling=scaling)
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    spec = spec_from_config({**config.to_dict(), "architectures": ["Phi3ForCausalLM"]}, {}).at_length(length)
    ours = cos_sin_tables(spec.ropes[0], 16, length)
    np.testing.assert_allclose(ours[0], cos[0, :, :8].numpy(), atol=1e-5)
    np.testing.assert_allclose(ours[1], sin[0, :, :8].numpy(), atol=1e-5)
    # sqrt(1 + ln(512 / 64) / ln 64)
    assert attention_scaling(spec.ropes[0]) == pytest.approx(1.5**0.5)


def test_dynamic_scaling_ends_where_it_would_begin():
    spec = spec_from_config({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {})
    assert (spec.ropes, spec.context_length) == ((Rope(theta=1e4),), 512)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "mistral",
            {"layer_types": ["full_attention"] * 3, "sliding_window": 16},
            "layer_types beside the sliding_window",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias True"),
        ("phi3", {"mlp_bias": True}, "mlp_bias True"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "8 of 16 values of a head rotate"),
        ("phi3", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8}}, "'longrope' lacks 'long_factor'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"hidden_activation": "gelu"}, "unsupported hidden_activation 'gelu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters names 'rope_theta'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; 3 were expected"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention without a window"),
        ("granite", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention"),
        ("granite", {"residual_multiplier": 0}, r"residual_scale is 0\.0"),
        ("olmo2", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention"),
        ("PanguEmbedded", {"mlp_bias": True}, "mlp_bias True"),
        ("internlm2", {"head_dim": 32}, "head_dim 32"),
        ("internlm3", {"qkv_bias": True, "bias": False}, "qkv_bias True beside bias False"),
        ("seed_oss", {"layer_types": ["sliding_attention"] * 3}, "sliding-window attention"),
        ("seed_oss", {"hidden_act": "relu2"}, "unsupported hidden_act 'relu2'"),
        ("seed_oss", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(family, change, message):
    with pytest.raises(CheckpointError, match=message):
        spec_from_config({**tiny_config_json(family), **change}, {})


@pytest.mark.parametrize(
    ("family", "check"),
    [
        ("mistral", lambda spec: spec.windows == () and spec.num_kv_heads == 2),
        (
            "gemma2",
            lambda spec: spec.tied_head and spec.layers[0].attention.softcap == 50 and spec.logits_softcap == 30,
        ),
        ("gemma3_text", lambda spec: spec.tied_head and [rope.theta for rope in spec.ropes] == [1e4]),
        ("smollm3", lambda spec: spec.tied_head and spec.ropes[0].theta == 2e6),
        ("granite", lambda spec: spec.layers[0].attention.scale == 1 and not spec.tied_head),
        ("olmo2", lambda spec: spec.rms_norm_eps == 1e-5),
        ("PanguEmbedded", lambda spec: spec.layers[0].attention.output_bias and spec.ropes[0].theta == 16e6),
        ("internlm2", lambda spec: spec.layers[0].attention.qkv_bias and spec.eos_token_ids == (2,)),
        ("seed_oss", lambda spec: spec.head_size == 128 and spec.layers[0].attention.qkv_bias),
        ("seed_oss", lambda spec: not (spec.layers[0].attention.output_bias or spec.layers[0].mlp.bias)),
    ],
)
def test_what_a_config_leaves_out_is_what_the_family_says(family, check):
    sizes = {name: tiny_config_json(family)[name] for name in LLAMA} | {"num_key_value_heads": 2}
    assert check(spec_from_config(sizes, {}))


def test_divided_frequencies():
    base = inverse_frequencies(Rope(theta=1e4), 8)
    divided = inverse_frequencies(Rope(theta=1e4, kind="divided", divisors=(1, 2, 4, 8)), 8)
    np.testing.assert_allclose(divided, base / [1, 2, 4, 8])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_model_that_takes_images_has_a_decoder(prefix, tmp_path):
    """Its text_config and its tensors behind a prefix; the other parts are left out."""
    folder = save_tiny_model(tmp_path / "model", "gemma3_text", tie_word_embeddings=True, sliding_window=16)
    alone = open_checkpoint(str(shutil.copytree(folder, tmp_path / "alone")))
    text = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    del text["architectures"], text["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": text}))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    tensors["vision_tower.encoder.layers.0.self_attn.q_proj.bias"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    # generation_config.json names the token of the tiny model.
    assert checkpoint.spec.eos_token_ids == (256, 1, 106)
    assert (checkpoint.spec.layers, checkpoint.spec.tied_head) == (alone.spec.layers, True)
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(load_float_model(checkpoint)(tokens).logits, load_float_model(alone)(tokens).logits)


def test_a_wrapped_decoder_that_is_missing():
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": None}
    with pytest.raises(CheckpointError, match="text_config is None; a JSON object was expected"):
        decoder_config(config)


@pytest.fixture
def sharded(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "sharded")
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_like_one_file(tiny_model, sharded):
    whole, parts = open_checkpoint(str(tiny_model)), open_checkpoint(str(sharded))
    assert whole.spec == parts.spec
    for name in whole.spec.tensors():
        np.testing.assert_array_equal(whole.read(name), parts.read(name))
    assert len(parts.files) == len(whole.files) + 1


def test_shards_outside_the_folder_are_not_read(sharded):
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"names the shard '\.\./secret\.safetensors', which is not in"):
        open_checkpoint(str(sharded))


def test_tensors_that_do_not_fit(tiny_model, tmp_path):
    def damaged(change):
        folder = shutil.copytree(tiny_model, tmp_path / "model", dirs_exist_ok=True)
        tensors = load_file(tiny_model / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        open_checkpoint(str(folder))

    with pytest.raises(CheckpointError, match=r"'norm\.weight' is missing"):
        damaged(lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"has shape \[3\]; the config asks for \[64\]"):
        damaged(lambda tensors: tensors.update({"model.norm.weight": np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match="stored as I8; float weights were expected"):
        damaged(lambda tensors: tensors.update({"model.norm.weight": np.zeros(64, np.int8)}))
    with pytest.raises(CheckpointError, match="the config has no such bias"):
        damaged(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}))


@pytest.mark.parametrize("extra", ["self_attn.q_norm.weight", "input_layernorm.bias", "mlp.router.weight"])
def test_a_weight_of_a_layer_that_the_spec_does_not_know(tiny_model, tmp_path, extra):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tiny_model / "model.safetensors")
    # What old versions of transformers saved beside the weights is passed over.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    open_checkpoint(str(folder))
    save_file({**tensors, f"model.layers.1.{extra}": np.zeros(64, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"unexpected tensor 'layers\.1\.{extra}'"):
        open_checkpoint(str(folder))


def test_pickled_weights_come_with_the_command_that_converts_them(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"is a pickle, which is never opened; convert it.*python -c 'from tr"):
        open_checkpoint(str(folder))


def test_bfloat16_is_read_as_it_is(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", dtype="bfloat16")
    checkpoint = open_checkpoint(str(folder))
    embedding = checkpoint.read("embed_tokens.weight")
    assert embedding.dtype.name == "bfloat16"
    np.testing.assert_array_equal(read_float32(checkpoint, "embed_tokens.weight"), embedding.astype(np.float32))


def write_gguf(path, architecture, model, config):
    """A GGUF file as llama.cpp writes it: q and k rows of Llama in interleaved pairs."""
    import gguf

    def interleaved(tensor, heads):
        if architecture != "llama":
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    writer = gguf.GGUFWriter(path, architecture)
    add_sizes(writer, config)
    writer.add_rope_freq_base(10000.0)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    for name, parameter in model.state_dict().items():
        tensor = parameter.numpy()
        name = name.removeprefix("model.")
        if name == "embed_tokens.weight":
            writer.add_tensor("token_embd.weight", tensor)
        elif name == "norm.weight":
            writer.add_tensor("output_norm.weight", tensor)
        elif name == "lm_head.weight":
            writer.add_tensor("output.weight", tensor)
        else:
            _, layer, rest = name.split(".", 2)
            module, parameter_name = rest.rsplit(".", 1)
            if module == "self_attn.q_proj":
                tensor = interleaved(tensor, config.num_attention_heads)
            if module == "self_attn.k_proj":
                tensor = interleaved(tensor, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{names[module]}.{parameter_name}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("architecture", GGUF_FAMILIES)
def test_gguf_holds_the_same_model(architecture, tmp_path):
    model = tiny_torch_model(architecture)
    write_gguf(tmp_path / "model.gguf", architecture, model, model.config)
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        again = load_float_model(checkpoint)(tokens).logits
    # Weights by columns instead of rows: the same sums in another order.
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_gguf_of_another_architecture(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="unsupported architecture: GGUF 'mamba'"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_the_hub_is_not_asked_for_the_same_weights_twice(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    text = [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "qwen.tiktoken",
    ]
    files = ["config.json", "model.safetensors", *text, "consolidated.safetensors", "original/params.json", "x.bin"]
    came = []

    def download(repository, *, allow_patterns, ignore_patterns):
        came.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name-of-none") == tmp_path
    assert came == files[:-3]


def test_a_folder_of_gguf_files_asks_for_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"name one of them, for example .*a\.gguf"):
        open_checkpoint(str(tmp_path))


def test_smollm2_has_the_weights_that_transformers_reads():
    """The 4-bit blocks, dequantized and de-interleaved, against transformers' own GGUF reader, bit for bit."""

    checkpoint = open_checkpoint("smollm2")
    assert checkpoint.spec.num_parameters() == 134515008
    assert checkpoint.spec.eos_token_ids == (2, 0)
    assert checkpoint.spec.tied_head
    model = _transformers_gguf(checkpoint)
    for name in (
        "embed_tokens.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.13.self_attn.k_proj.weight",
        "layers.29.mlp.down_proj.weight",
        "norm.weight",
    ):
        np.testing.assert_array_equal(read_float32(checkpoint, name), model.model.get_parameter(name).detach().numpy())


def _transformers_gguf(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint.location.parent, gguf_file=checkpoint.location.name, dtype=torch.float32
    )
