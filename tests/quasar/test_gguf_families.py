"""GGUF files of every family against the transformers model that they hold; names are those of llama.cpp's package."""

import re

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calibration.float_model import load_float_model
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.checkpoint import at_length
from quasar.checkpoints.rope import attention_scaling
from quasar.checkpoints.spec import Rope
from quasar.errors import CheckpointError
from tests.tiny import VOCABULARY, save_tiny_model, tiny_torch_model
from tests.tiny_gguf import add_sizes, save_tiny_gguf

# What converters put into a header beyond sizes, by family: transformers' options and llama.cpp's keys for them.
FAMILIES = {
    "gemma2": (
        {"query_pre_attn_scalar": 16, "sliding_window": 16, "attn_logit_softcapping": 3.0, "tie_word_embeddings": True},
        {"attention.sliding_window": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": (
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}},
        },
        {
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": (
        {"partial_rotary_factor": 0.5, "hidden_size": 128, "sliding_window": 16},
        {"rope.dimension_count": 16, "attention.sliding_window": 16},
    ),
    "granite": (
        {"attention_multiplier": 0.4, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.5},
        {"attention.scale": 0.4, "embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 0.5},
    ),
    "smollm3": ({"num_hidden_layers": 5}, {"rope.freq_base": 2e6}),
    "olmo2": ({}, {}),
    "internlm2": ({}, {}),
    "seed_oss": ({"attention_out_bias": True, "head_dim": 32}, {"attention.key_length": 32}),
}
# Those whose q and k rows llama.cpp's converter interleaves, as Llama's.
INTERLEAVED = ("granite", "smollm3", "internlm2")
LONG, SHORT = [1.0 + pair for pair in range(8)], [1.0 + pair / 4 for pair in range(8)]


def stored_tensors(family, model):
    """Name → tensor as llama.cpp's converter writes them, from a model as transformers has it."""
    config = model.config
    architecture = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[gguf_name(family)]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name, parameter in model.state_dict().items():
        tensor = parameter.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if family in INTERLEAVED and f".{part}." in name:
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(tensor)
    return found


def gguf_name(family):
    return "gemma3" if family == "gemma3_text" else family


def write(path, family, model, fields, **tensors):
    config = model.config
    name = gguf_name(family)
    writer = gguf.GGUFWriter(path, name)
    add_sizes(writer, config)
    if family.startswith("gemma"):
        writer.add_key_length(config.head_dim)
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{name}.{key}", value)
    for tensor, value in {**stored_tensors(family, model), **tensors}.items():
        writer.add_tensor(tensor, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_the_model(family, tmp_path):
    options, fields = FAMILIES[family]
    model = tiny_torch_model("llama" if family == "internlm2" else family, **options)
    checkpoint = open_checkpoint(str(write(tmp_path / "model.gguf", family, model, fields)))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (1, 40)))
    with torch.inference_mode():
        expected = model(tokens).logits
        again = load_float_model(checkpoint)(tokens).logits
    # Weights by columns instead of rows: the same sums in another order. Norms of Gemma had 1 added and taken away.
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_and_a_folder_have_one_spec(family, tmp_path):
    options, fields = FAMILIES[family]
    folder = save_tiny_model(tmp_path / "folder", family, **options)
    own = folder / "reference" if family == "internlm2" else folder
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    file, whole = (
        open_checkpoint(str(write(tmp_path / "model.gguf", family, model, fields))),
        open_checkpoint(str(folder)),
    )
    # Factors went through float32.
    assert [layer.attention.window for layer in file.spec.layers] == [
        layer.attention.window for layer in whole.spec.layers
    ]
    assert (file.spec.ropes, file.spec.tied_head) == (whole.spec.ropes, whole.spec.tied_head)
    for name in ("embedding_scale", "logits_scale", "logits_softcap", "norm_offset"):
        assert getattr(file.spec, name) == pytest.approx(getattr(whole.spec, name))
    assert file.spec.tensors() == whole.spec.tensors()
    for name in whole.spec.tensors():
        # The 1 of Gemma's norms, added and taken away in float32.
        np.testing.assert_allclose(file.read(name), whole.read(name), rtol=0, atol=2e-7)


@pytest.mark.parametrize("length", [64, 128])
def test_divisors_of_long_contexts_are_tensors(length, tmp_path):
    scaling = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    model = tiny_torch_model("phi3", original_max_position_embeddings=64, rope_scaling=scaling)
    fields = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.5**0.5}
    factors = {"short": SHORT, "long": LONG}
    tensors = {f"rope_factors_{name}.weight": np.asarray(value, np.float32) for name, value in factors.items()}
    checkpoint = at_length(open_checkpoint(str(write(tmp_path / "m.gguf", "phi3", model, fields, **tensors))), length)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (1, length)))
    with torch.inference_mode():
        expected = model(tokens).logits
        again = load_float_model(checkpoint)(tokens).logits
    # Sums in another order.
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "extra", ["blk.0.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight", "output.bias", "cls.weight"]
)
def test_a_tensor_that_the_family_does_not_know(extra, tmp_path):
    with pytest.raises(CheckpointError, match=rf"m\.gguf: unexpected tensor '{re.escape(extra)}'"):
        open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", layers=2, extra={extra: np.ones(64, np.float32)})))


@pytest.mark.parametrize(
    "extra", ["blk.0.attn_rot_embd.weight", "blk.1.nextn.eh_proj.weight", "v.blk.0.attn_q.weight", "mm.0.weight"]
)
def test_tensors_that_have_no_part_in_the_decoder(extra, tmp_path):
    open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", extra={extra: np.ones(64, np.float32)})))


def test_divisors_of_rotary_frequencies_are_data(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    path = save_tiny_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})
    (rope,) = open_checkpoint(str(path)).spec.ropes
    assert (rope.kind, rope.divisors) == ("divided", tuple(divisors.tolist()))
    divisors[3] = 0
    with pytest.raises(CheckpointError, match="the rope scaling does not fit"):
        open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})))


_YARN = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 128}


def tiny_rope(tmp_path, **fields):
    values = {f"llama__rope__{key}": value for key, value in fields.items()}
    (rope,) = open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", **values))).spec.ropes
    return rope


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling__factor": 4.0}, 4.0),
        ({"scaling__type": "linear", "scaling__factor": 4.0}, 4.0),
        ({"scale_linear": 2.0, "scaling__factor": 4.0}, 4.0),
        ({"scaling__factor": 1.0}, 1.0),
        ({"scaling__factor": 0.0}, 1.0),
        ({"scaling__type": "none", "scaling__factor": 4.0}, 1.0),
        ({"scaling__type": "none", "scale_linear": 4.0}, 1.0),
    ],
)
def test_a_factor_without_a_type_is_linear(fields, factor, tmp_path):
    expected = Rope(theta=1e4) if factor == 1 else Rope(theta=1e4, kind="linear", factor=factor)
    assert tiny_rope(tmp_path, **fields) == expected


def test_a_share_of_the_head_is_scaled_as_well(tmp_path):
    options, fields = FAMILIES["phi3"]
    path = write(tmp_path / "m.gguf", "phi3", tiny_torch_model("phi3", **options), {**fields, "rope.scale_linear": 4.0})
    (rope,) = open_checkpoint(str(path)).spec.ropes
    assert rope == Rope(theta=1e4, kind="linear", factor=4.0, rotary_size=16)


def test_what_a_header_says_of_yarn(tmp_path):
    plain = tiny_rope(tmp_path, **_YARN)
    assert (plain.beta_fast, plain.beta_slow, plain.attention_factor) == (32, 1, None)
    defaults = {"yarn_attn_factor": 1.0, "yarn_ext_factor": -1.0, "yarn_log_multiplier": 0.0, "attn_factor": 1.0}
    assert tiny_rope(tmp_path, **_YARN, **{f"scaling__{key}": value for key, value in defaults.items()}) == plain
    # llama.cpp multiplies YaRN's own factor by it.
    values = {"scaling__yarn_beta_fast": 16.0, "scaling__yarn_beta_slow": 2.0, "scaling__attn_factor": 0.5}
    rope = tiny_rope(tmp_path, **_YARN, **values, scaling__yarn_ext_factor=1.0)
    assert (rope.beta_fast, rope.beta_slow) == (16, 2)
    assert attention_scaling(rope) == pytest.approx(0.5 * attention_scaling(plain))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**_YARN, "scaling__yarn_attn_factor": 1.5},
            r"llama\.rope\.scaling\.yarn_attn_factor is 1\.5; 1 was expected",
        ),
        ({**_YARN, "scaling__yarn_ext_factor": 0.5}, r"llama\.rope\.scaling\.yarn_ext_factor is 0\.5; 1 was expected"),
        ({**_YARN, "scaling__yarn_log_multiplier": 0.1}, r"yarn_log_multiplier is 0\.1; 0 was expected"),
        ({"scaling__attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor is 1\.5; 1 was expected"),
    ],
)
def test_what_is_not_read_of_a_rope_scaling_is_named(fields, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"unsupported option: .*{message}"):
        tiny_rope(tmp_path, **fields)


def test_soft_caps_that_the_first_files_of_gemma_2_lack(tmp_path):
    options, fields = FAMILIES["gemma2"]
    fields = {key: value for key, value in fields.items() if "softcapping" not in key}
    path = write(tmp_path / "m.gguf", "gemma2", tiny_torch_model("gemma2", **options), fields)
    spec = open_checkpoint(str(path)).spec
    assert (spec.logits_softcap, spec.layers[0].attention.softcap) == (30, 50)


def test_divisors_that_are_not_read(tmp_path):
    """Those of long contexts alone say nothing of short ones."""
    extra = {"rope_factors_long.weight": np.ones(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'rope_factors_long\.weight'"):
        open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", extra=extra)))
