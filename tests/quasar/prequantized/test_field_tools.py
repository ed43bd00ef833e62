"""What AutoGPTQ and AutoAWQ packed themselves (record_field_tools.py): read as their own code reads it."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quasar.checkpoints import open_checkpoint
from tests.prequantized import awq, awq_config, gptq, gptq_config, save_quantized
from tests.quasar.prequantized.record_field_tools import AWQ, GPTQ, INPUTS, OUTPUTS, RECORDED

LAYOUTS = {
    **{
        name: (
            gptq_config(bits, group, sym=symmetric, desc_act=apart),
            gptq(bits, group, symmetric=symmetric, shuffled=apart),
        )
        for name, (bits, group, symmetric, apart) in GPTQ.items()
    },
    **{name: (awq_config(group), awq(group)) for name, group in AWQ.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_the_tools_own_code(tmp_path, layout):
    """They multiply by a scale in float16, and this project in float32: equal once that is rounded."""
    config, pack = LAYOUTS[layout]
    # A KV head of the size that was recorded; its module takes the tool's tensors.
    save_quantized(tmp_path, config, pack, num_key_value_heads=1)
    with safe_open(RECORDED, "pt") as recorded:
        assert recorded.metadata().keys() == {"AutoGPTQ", "AutoAWQ", "torch"}
    tensors = load_file(RECORDED).items()
    parts = {key.removeprefix(f"{layout}/"): value for key, value in tensors if key.startswith(f"{layout}/")}
    expected = parts.pop("weight").numpy()
    assert expected.shape == (OUTPUTS, INPUTS)
    module = "model.layers.1.self_attn.k_proj"
    tensors = load_file(tmp_path / "model.safetensors")
    for part, value in parts.items():
        stored = tensors[f"{module}.{part}"]
        assert (value.shape, value.dtype) == (stored.shape, stored.dtype)
        tensors[f"{module}.{part}"] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = open_checkpoint(str(tmp_path)).read("layers.1.self_attn.k_proj.weight")
    assert np.abs(expected).max() > 0.05
    np.testing.assert_array_equal(read.astype(np.float16), expected)
