"""Quantized folders of safetensors: the weights that they stand for, and refusals of what contradicts itself."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quasar.checkpoints import open_checkpoint
from quasar.errors import CheckpointError
from tests.prequantized import awq, awq_config, compressed, compressed_config, gptq, gptq_config, save_quantized

_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_W8A8 = compressed_config("int-quantized", _CHANNEL, _TOKEN)
_W4A16 = compressed_config(
    "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
)
_ASYMMETRIC = compressed_config(
    "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
)
_W8A16 = compressed_config("pack-quantized", _CHANNEL)
# Layout → its config, how it is packed, whether it is symmetric, inputs that share a scale (0: a channel's).
LAYOUTS = {
    "gptq": (gptq_config(), gptq(), True, 32),
    "gptq, 8 bits": (gptq_config(8, 128), gptq(8, 128), True, 128),
    "gptq, one group": (gptq_config(group=-1), None, True, 0),
    "gptq with zeros": (gptq_config(group=64, sym=False), gptq(group=64, symmetric=False), False, 64),
    "gptq_v2 with zeros": (
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        gptq(symmetric=False, version=2),
        False,
        32,
    ),
    "gptq in another order": (gptq_config(desc_act=True), gptq(shuffled=True), True, 1),
    "awq": (awq_config(), awq(), False, 32),
    "awq, symmetric": (awq_config(128), awq(128, symmetric=True), True, 128),
    "compressed-tensors W8A8": (_W8A8, compressed(_W8A8), True, 0),
    "compressed-tensors W4A16": (_W4A16, compressed(_W4A16), True, 32),
    "compressed-tensors with zeros": (_ASYMMETRIC, compressed(_ASYMMETRIC), False, 64),
    "compressed-tensors W8A16": (_W8A16, compressed(_W8A16), True, 0),
}


def one_group(weight):
    return gptq(group=weight.shape[1])(weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_that_the_tensors_stand_for(tmp_path, layout):
    config, pack, symmetric, group = LAYOUTS[layout]
    expected = save_quantized(tmp_path, config, pack or one_group)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.quantized_by in ("GPTQ", "AWQ", "compressed-tensors")
    for module, weight in expected.items():
        read = checkpoint.read(f"{module}.weight")
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, weight.numpy())
        stored = checkpoint.prequantized(f"{module}.weight")
        np.testing.assert_array_equal(stored.dequantized(), read)
        assert (stored.offset is None) == symmetric
        assert stored.group_size == (group or weight.shape[1])
    assert checkpoint.prequantized("lm_head.weight") is None
    assert checkpoint.prequantized("layers.0.input_layernorm.weight") is None


def test_transformers_computes_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    from calibration.float_model import load_float_model

    save_quantized(tmp_path, _W4A16, compressed(_W4A16))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        ours = load_float_model(open_checkpoint(str(tmp_path)))(ids).logits
    # The same weights: sums in another memory order.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_quantized_head_is_one_of_its_own(tmp_path):
    expected = save_quantized(tmp_path, gptq_config(lm_head=True), gptq(), tie_word_embeddings=True)
    assert expected
    tensors = load_file(tmp_path / "model.safetensors")
    packed, weight = gptq()(torch.randn(320, 128))
    save_file(
        {**tensors, **{f"lm_head.{part}": one.contiguous() for part, one in packed.items()}},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.spec.tied_head
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), weight.numpy())


def test_biases_of_zeros_that_old_tools_write(tmp_path):
    save_quantized(tmp_path, gptq_config(), gptq())
    _add(tmp_path, "model.layers.0.mlp.up_proj.bias", torch.zeros(256))
    open_checkpoint(str(tmp_path))
    _add(tmp_path, "model.layers.0.mlp.up_proj.bias", torch.ones(256))
    with pytest.raises(CheckpointError, match="has no such bias"):
        open_checkpoint(str(tmp_path))


def _add(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors")


_UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", torch.ones(3, 256).half(), r"scales has shape \[3, 256\]; quantization_config asks for \[4, 256\]"),
        ("scales", torch.full((4, 256), torch.nan).half(), "scales that are not finite"),
        ("qzeros", torch.zeros(4, 31, dtype=torch.int32), r"qzeros has shape \[4, 31\]"),
        ("qweight", torch.zeros(16, 255, dtype=torch.int32), r"holds a weight of \[255, 128\], quantized by GPTQ"),
        ("qweight", torch.zeros(16, 256), "qweight is stored as float32; int32 was expected"),
        ("qweight", torch.zeros(16, dtype=torch.int32), "no weight in the layout of GPTQ"),
        ("g_idx", torch.full((128,), 4, dtype=torch.int32), "an input is of group 4; there are 4"),
        ("g_idx", torch.zeros(5, dtype=torch.int32), "the groups of 128 inputs were expected"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(tmp_path, part, tensor, message):
    save_quantized(tmp_path, gptq_config(), gptq())
    _add(tmp_path, f"{_UP}.{part}", tensor)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path)).read(f"{_UP.removeprefix('model.')}.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gptq_config(bits=3), "GPTQ with bits 3"),
        (gptq_config(group="all"), "group_size 'all'"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin'; gptq or gptq_v2 was expected"),
        (gptq_config(dynamic={"+:mlp": {"bits": 8}}), "'dynamic' gives modules bits of their own"),
        (awq_config(version="gemv"), "AWQ of version 'gemv'"),
        ({**_W8A8, "format": "float-quantized"}, "format 'float-quantized'"),
        ({**_W8A8, "config_groups": {}}, "has no config_groups"),
        ({**_W8A8, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({**_W8A8, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        (compressed_config("pack-quantized", {**_CHANNEL, "num_bits": 3}), "3 bits, type 'int'"),
        (compressed_config("pack-quantized", {**_CHANNEL, "strategy": "block"}), "strategy 'block'"),
        (compressed_config("pack-quantized", {**_CHANNEL, "strategy": "group"}), "group_size None"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"already quantized \(bitsandbytes\)"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, config, message):
    save_quantized(tmp_path, config, gptq())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_dense_sparsity_config_says_nothing_of_how_weights_are_stored(tmp_path):
    sparsity = {"format": "dense", "global_sparsity": 0.14, "registry_requires_subclass": False, "targets": []}
    config = {**_W8A8, "sparsity_config": sparsity}
    save_quantized(tmp_path, config, compressed(config))
    assert open_checkpoint(str(tmp_path)).read("layers.0.self_attn.q_proj.weight").any()


def test_compressed_tensors_of_no_scheme_are_refused(tmp_path):
    save_quantized(tmp_path, _W4A16, compressed(_W4A16))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_scale has shape \[128, 4\], which none of"):
        open_checkpoint(str(tmp_path)).read("layers.0.self_attn.q_proj.weight")


def test_integers_that_are_stored_as_floats_are_refused(tmp_path):
    """As tools leave them that only pretend to quantize: the scale would be applied twice."""
    save_quantized(tmp_path, _W8A8, compressed(_W8A8))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as float16; int8 was expected"):
        open_checkpoint(str(tmp_path)).read("layers.1.mlp.up_proj.weight")


def test_a_scale_without_a_shape_is_refused(tmp_path):
    save_quantized(tmp_path, _W4A16, compressed(_W4A16))
    _add(tmp_path, "model.layers.1.mlp.up_proj.weight_scale", torch.tensor(1.0))
    with pytest.raises(CheckpointError, match="which is no weight in the layout of compressed-tensors"):
        open_checkpoint(str(tmp_path)).read("layers.1.mlp.up_proj.weight")
