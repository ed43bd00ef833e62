"""GGUF's blocks as integers, scales and offsets, against the package gguf's own dequantization."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.prequantized.gguf_blocks import prequantized_blocks
from quasar.errors import CheckpointError

_TYPES = ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K")


def random_blocks(name: str, rows: int, inputs: int) -> np.ndarray:
    """Bytes of any kind, but with factors that are no extreme floats."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    random = np.random.default_rng(sum(name.encode()))
    blocks = random.integers(0, 256, (rows * inputs // block, size), np.uint8)
    factors = 4 if name in ("Q4_1", "Q4_K", "Q5_K") else 2
    halves = random.standard_normal((len(blocks), factors // 2)).astype(np.float16)
    blocks[:, :factors] = halves.view(np.uint8).reshape(len(blocks), factors)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", _TYPES)
def test_blocks_stand_for_what_gguf_makes_of_them(name):
    rows = random_blocks(name, 5, 512)
    found = prequantized_blocks(name, rows)
    expected = gguf.dequantize(rows, GGMLQuantizationType[name])
    assert found.values.shape == expected.shape
    assert found.scale.shape == (5, 16)
    assert (found.offset is not None) == (name in ("Q4_1", "Q4_K", "Q5_K"))
    np.testing.assert_array_equal(found.dequantized(), expected)


@pytest.mark.parametrize("name", ["Q6_K", "Q3_K", "IQ4_NL", "F16"])
def test_other_grids_are_none(name):
    assert prequantized_blocks(name, np.zeros((2, 420), np.uint8)) is None


def test_a_file_has_the_rows_that_it_is_read_with():
    checkpoint = open_checkpoint("smollm2")
    assert checkpoint.quantized_by == ""
    # llama.cpp stores the rows of q and k in another order than those of the others.
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        stored = checkpoint.prequantized(f"layers.2.{name}.weight")
        read = checkpoint.read(f"layers.2.{name}.weight")
        assert stored.form == "Q4_1"
        assert stored.group_size == 32
        np.testing.assert_array_equal(stored.dequantized(), read)
    assert checkpoint.prequantized("embed_tokens.weight").form == "Q8_0"
    assert checkpoint.prequantized("layers.2.input_layernorm.weight") is None


def test_scales_that_are_not_finite_are_refused():
    rows = random_blocks("Q8_0", 2, 64)
    rows[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match="token_embd has scales that are not finite"):
        prequantized_blocks("Q8_0", rows).check("token_embd")
