"""Each rung of the ladder in the graph: canonical = fake-quantized = lowered, on stock and native kernels."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calibration.fake_quantization import FakeQuantizedLinear, fake_quantized, module_of
from calibration.float_model import load_float_model
from calibration.precisions.catalog import precision_of
from engines.onnxruntime.executed import check_integer_matmuls, executed_kernels
from engines.onnxruntime.probing import runs_stock_integers
from export.passes.quantized_linear import quantized_linears
from plugins.cpu import toolchain
from quasar.checkpoints import open_checkpoint
from quasar.errors import EngineError
from quasar.numerics import dequantize_weight
from tests.graphs import export_graphs, lowered_session, native_session, run_canonical, run_in_chunks
from tests.tiny import VOCABULARY, save_tiny_model

PRECISIONS = (
    *("w8a8-token", "w8a8-block", "w8a8-static", "w4a8", "w4a8-128", "w4a8-offset", "w4a8-128-offset"),
    *("w4a16", "w4a16-128-offset"),
)
OPERATORS = {
    "w8a8-token": "W8A8Linear",
    "w8a8-block": "W8A8BlockLinear",
    "w8a8-static": "MatMul",
    "w4a8": "W4A8BlockLinear",
    "w4a8-128": "W4A8BlockLinear",
    "w4a8-offset": "W4A8BlockLinear",
    "w4a8-128-offset": "W4A8BlockLinear",
    "w4a16": "W4A16BlockLinear",
    "w4a16-128-offset": "W4A16BlockLinear",
}
# Inputs of a group of its precision and more: a tiny model's are no multiple of 128.
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
SIZES = dict.fromkeys(("w4a8-128", "w4a8-128-offset", "w4a16-128-offset"), _WIDE)
STATIC_SCALE = 0.05
ARCHITECTURES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=[(name, precision) for name in ARCHITECTURES for precision in PRECISIONS])
def exported(request, tmp_path_factory):
    architecture, precision = request.param
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = open_checkpoint(str(save_tiny_model(folder / "model", architecture, **SIZES.get(precision, {}))))
    scales = {linear.name: STATIC_SCALE for linear in checkpoint.spec.linears()}
    contract = export_graphs(checkpoint, folder, precision=precision, static_scales=scales)
    return checkpoint, precision, folder, contract


def tokens_of(count):
    return np.random.default_rng(3).integers(0, VOCABULARY, count)


def fake_quantized_logits(checkpoint, precision, tokens):
    model = load_float_model(checkpoint)
    linears = {}
    for linear in checkpoint.spec.linears():
        weight = torch.cat([module_of(model, member).weight for member in linear.members]).numpy()
        rounded = torch.from_numpy(dequantize_weight(precision_of(precision).quantize(weight)))
        linears[linear.name] = FakeQuantizedLinear(
            precision=precision_of(precision),
            weight=rounded.__getitem__,
            num_outputs=linear.outputs,
            static_scale=STATIC_SCALE,
        )
    with torch.inference_mode(), fake_quantized(model, checkpoint.spec, linears):
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def test_canonical_graph_computes_what_the_search_judged(exported):
    """Up to roundings that float32's last bit tips over: few, each worth a step of one linear."""
    checkpoint, precision, folder, contract = exported
    tokens = tokens_of(40)
    canonical = run_canonical(folder, contract, tokens)
    expected = fake_quantized_logits(checkpoint, precision, tokens)
    spread = expected.max() - expected.min()
    assert np.median(np.abs(canonical - expected)) < 0.01 * spread
    assert np.abs(canonical - expected).max() < 0.1 * spread


def test_lowered_graph_computes_the_same(exported):
    """MatMulNBits and the native operators round in an order of their own; so again up to a few roundings."""
    checkpoint, _, folder, contract = exported
    tokens = tokens_of(40)
    expected = run_canonical(folder, contract, tokens)
    spread = expected.max() - expected.min()
    sessions = [lowered_session(folder, contract)]
    if toolchain.LIBRARY.is_file():
        sessions.append(native_session(folder, contract, checkpoint.spec))
    for session in sessions:
        found = run_in_chunks(session, tokens, 40)
        assert np.median(np.abs(found - expected)) < 0.01 * spread
        assert np.abs(found - expected).max() < 0.1 * spread


def test_positions_do_not_depend_on_the_width(exported):
    checkpoint, precision, folder, contract = exported
    tokens = tokens_of(24)
    if toolchain.LIBRARY.is_file():
        session = native_session(folder, contract, checkpoint.spec)
        whole = run_in_chunks(session, tokens, 24)
        for width in (1, 2, 3, 5, 8):
            np.testing.assert_array_equal(run_in_chunks(session, tokens, width), whole)
    # Weights that become floats in each pass are multiplied in another order by width: no drafts are verified there.
    if not precision_of(precision).has_integer_activations:
        return
    session = lowered_session(folder, contract)
    whole = run_in_chunks(session, tokens, 24)
    for width in (1, 2, 3, 5, 8):
        # Where a CPU has AVX2 alone, ONNX Runtime multiplies one position by 4-bit weights in another order than
        # several: the probe finds it, and every pass has two.
        if width > 1 or not precision.startswith("w4"):
            np.testing.assert_array_equal(run_in_chunks(session, tokens, width), whole)


def test_linears_run_as_integer_matmuls(exported):
    checkpoint, precision, folder, contract = exported
    if not precision_of(precision).has_integer_activations:
        pytest.skip("ONNX Runtime computes its canonical form, in floats")
    linears = {linear.name: precision for linear in checkpoint.spec.linears()}
    kernels = executed_kernels(folder, folder / "lowered.onnx", contract)
    assert check_integer_matmuls(kernels, linears) == len(linears)
    kernels["lm_head.matmul"] = "MatMul"
    with pytest.raises(EngineError, match="the INT8 linear lm_head ran as MatMul"):
        check_integer_matmuls(kernels, linears)


def test_which_linears_run_on_stock_integer_kernels(exported):
    checkpoint, precision, folder, contract = exported
    # MatMulNBits counts, whatever it makes of activations; the canonical form of floats is a MatMul.
    assert runs_stock_integers(folder / "lowered.onnx") == (precision != "w4a16-128-offset")
    if toolchain.LIBRARY.is_file():
        native_session(folder, contract, checkpoint.spec)
        # Native graphs leave static scales to ONNX Runtime, whose kernels may saturate.
        assert runs_stock_integers(folder / "native.onnx") == (precision == "w8a8-static")


def test_float_linears_run_on_no_integer_kernels(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", "llama")))
    export_graphs(checkpoint, tmp_path, precision="fp32")
    assert not runs_stock_integers(tmp_path / "lowered.onnx")


def test_linears_are_found_by_their_form(exported):
    checkpoint, precision, folder, contract = exported
    graph = ir.load(folder / "canonical.onnx").graph
    found = list(quantized_linears(graph, *PRECISIONS))
    assert [linear.name for linear in found] == [linear.name for linear in checkpoint.spec.linears()]
    assert {linear.precision for linear in found} == {precision}
    if toolchain.LIBRARY.is_file():
        native_session(folder, contract, checkpoint.spec)
        native = ir.load(folder / "native.onnx").graph
        kinds = [node.op_type for node in native]
        assert kinds.count(OPERATORS[precision]) == len(found)
