"""The embedding of an engine: 16 bits, in the type that suits its values; float32 where nothing is quantized."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from calibration.recipe import make_recipe
from calibration.smoothing import SmoothingFactors
from calibration.stored_table import in_16_bits
from calibration.weights import PreparedWeights
from engines.directory import open_directory
from quasar.checkpoints import open_checkpoint
from tests.tiny import save_tiny_model
from tests.tiny_gguf import save_tiny_gguf


def normal(rows=5000, columns=16):
    return np.random.default_rng(0).standard_normal((rows, columns), np.float32)


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_values_that_a_type_holds_stay_exact(kind):
    stored = normal().astype(kind)
    assert in_16_bits(stored) is stored
    found = in_16_bits(stored.astype(np.float32))
    assert found.dtype == kind
    np.testing.assert_array_equal(found.view(np.uint16), stored.view(np.uint16))


def test_other_values_are_rounded_to_float16():
    table = normal()
    # Tokens that were never trained.
    table[7] = 1e-30
    stored = in_16_bits(table)
    assert stored.dtype == np.float16
    loss = np.abs(stored.astype(np.float64) - table)
    is_normal = np.abs(table) >= 2.0**-14
    assert (loss[is_normal] <= 2.0**-11 * np.abs(table[is_normal])).all()
    assert loss[~is_normal].max() <= 2.0**-25


@pytest.mark.parametrize("scale", [3e4, 1e-7])
def test_values_outside_of_float16_are_rounded_to_bfloat16(scale):
    table = normal() * np.float32(scale)
    stored = in_16_bits(table)
    assert stored.dtype == ml_dtypes.bfloat16
    assert (np.abs(stored.astype(np.float64) - table) <= 2.0**-8 * np.abs(table)).all()


def embedding_of(checkpoint, precision):
    recipe = make_recipe(checkpoint.spec, precision=precision, alpha="off")
    return PreparedWeights(checkpoint, recipe, SmoothingFactors()).embedding()


def test_a_table_of_float32_has_16_bits_in_a_quantized_engine_alone(tmp_path):
    save_tiny_gguf(tmp_path / "model.gguf")
    checkpoint = open_checkpoint(str(tmp_path / "model.gguf"))
    table = checkpoint.read("embed_tokens.weight")
    assert table.dtype == np.float32
    np.testing.assert_array_equal(embedding_of(checkpoint, "fp32"), table)
    stored = embedding_of(checkpoint, "w8a8")
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, table.astype(np.float16))


def test_a_tied_float_head_reads_the_same_table(tmp_path, build_engine):
    model = save_tiny_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    directory = open_directory(build_engine(model, keep_float=("lm_head",), alpha="off"))
    for name in ("verifier.onnx", "onnxruntime/verifier.onnx"):
        tensors = ir.load(directory.file(name)).graph.initializers
        assert tensors["embed_tokens.weight"].dtype == ir.DataType.FLOAT16
        assert "lm_head.weight" not in tensors
