"""A precision is one object and one line: 8-bit weights under float activations, added here and built end to end."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch

import runtime
from calibration.fake_quantization import FakeQuantizedLinear, fake_quantized, module_of
from calibration.float_model import load_float_model
from calibration.precisions.base import NATIVE, ONNXRUNTIME, TENSORRT, Operator, Refused
from calibration.precisions.catalog import PRECISIONS
from calibration.precisions.int8 import Int8Weights, dequantized
from calibration.quantization import quantize_model
from calibration.recipe import make_recipe
from calibration.search import steps_of
from calibration.stored_table import in_16_bits
from calibration.texts import TokenizedText
from engines import load_engine
from engines.onnxruntime.files import onnxruntime_files
from export.build_options import Silent
from export.compile import CompileOptions, compile_engine
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from quasar.numerics import BLOCK


class WeightsAlone(Int8Weights):
    name, choice, help = "w8a32", "w8a32", "INT8 weights, float activations"
    label, form, title, colour = "weights", "in INT8 weights alone", "INT8 in weights alone", "#00ff00"
    has_integer_activations = False
    clips_weights = True
    input_multiple = BLOCK
    lowerings: ClassVar = {
        # As it is, ONNX Runtime would make it MatMulNBits with activations rounded to INT8 (accuracy level 4).
        ONNXRUNTIME: Operator(
            op_type="MatMulNBits",
            domain="com.microsoft",
            pack=lambda weight, gated: (
                (weight.values.view(np.uint8) ^ 0x80).reshape(len(weight.values), -1, BLOCK),
                np.repeat(weight.scale[:, None], weight.values.shape[1] // BLOCK, axis=1),
            ),
            attributes=lambda outputs, inputs: {
                "K": inputs,
                "N": outputs,
                "bits": 8,
                "block_size": BLOCK,
                "accuracy_level": 1,
            },
        ),
        NATIVE: Refused(reason="no native operator takes float activations"),
        TENSORRT: Refused(reason="nobody has tried it on TensorRT"),
    }

    def round_activations(self, x, static_scale, /):
        return x

    def canonical(self, graph, x, weight, static_scale, /):
        return graph.product("MatMul", [x, dequantized(graph, weight)], "matmul")


@pytest.fixture(scope="module")
def engine(tiny_model, build_engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRECISIONS, WeightsAlone.name, WeightsAlone())
        yield build_engine(tiny_model, precision=WeightsAlone.choice, alpha="off")


def test_the_engine_computes_what_is_fake_quantized(engine, tiny_model):
    checkpoint, precision = open_checkpoint(str(tiny_model)), PRECISIONS[WeightsAlone.name]
    model, linears = load_float_model(checkpoint), {}
    stored = in_16_bits(checkpoint.read("embed_tokens.weight")).astype(np.float32)
    for linear in checkpoint.spec.linears():
        weight = torch.cat([module_of(model, member).weight for member in linear.members]).detach()
        rounded = precision.rounded(weight, precision.scales_of(weight))
        linears[linear.name] = FakeQuantizedLinear(
            precision=precision, weight=rounded.__getitem__, num_outputs=linear.outputs
        )
    tokens = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, 24)
    with torch.inference_mode():
        exact = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        # The engine stores its embedding in 16 bits.
        module_of(model, "embed_tokens").weight.copy_(torch.from_numpy(stored))
        with fake_quantized(model, checkpoint.spec, linears):
            expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    found = load_engine(engine).session.run_logits(tokens, 0, len(tokens))
    # Nothing is rounded on the way: only the order of float32 sums differs.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
    assert np.abs(found - exact).max() > 1e-3 * np.ptp(expected)


def test_it_generates_on_stock_kernels_and_is_refused_elsewhere(engine):
    loaded = runtime.load(engine)
    plain = loaded.generate("A kettle", max_new_tokens=12, drafter="none").token_ids
    assert loaded.generate("A kettle", max_new_tokens=12).token_ids == plain
    manifest = load_engine(engine).directory.manifest
    assert (manifest.precision, set(manifest.linears.values())) == ("w8a32", {"w8a32"})
    assert onnxruntime_files(manifest).native_graph == ""
    operators = [node.op_type for node in ir.load(engine / "verifier.onnx").graph]
    assert operators.count("DequantizeLinear") == len(manifest.linears)
    assert "QuantizeLinear" not in operators
    with pytest.raises(BuildError, match=r"13 linears are INT8 in weights alone, and nobody has tried it on TensorRT"):
        compile_engine(CompileOptions(directory=engine, backend="tensorrt-rtx", compute_capabilities=("8.9",)))


def test_the_search_takes_it(engine, tiny_model, tmp_path):
    checkpoint = open_checkpoint(str(tiny_model))
    random, spec = np.random.default_rng(0), checkpoint.spec
    tokens = random.integers(0, spec.vocab_size, (8, 32)).tolist()
    texts = [TokenizedText(prompt=tuple(row[:20]), continuation=tuple(row[20:])) for row in tokens]
    recipe = make_recipe(spec, precision=WeightsAlone.choice, alpha="auto")
    found = quantize_model(checkpoint, recipe, texts, tmp_path, Silent().steps, effort="thorough")
    assert [step["step"] for step in found.record["search"]["steps"]] == list(steps_of(WeightsAlone(), "thorough"))
    assert all(figure.sqnr_db > 30 for figure in found.figures.values())
