"""Each pass: its conditions, and that outputs stay what they were."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PreconditionError

from engines import contract as names
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.probes.integer_check import INPUT, OUTPUT, check_inputs
from export.integer_check_graph import build_integer_check
from export.passes import KeepLayers, LowerToOnnxRuntime, UnsignedActivations
from quasar.checkpoints import open_checkpoint
from quasar.numerics import dequantize_tokens, quantize_tokens
from tests.graphs import contract_of, exact_session, export_graphs, lowered_session


@pytest.fixture(scope="module")
def graphs(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint = open_checkpoint(str(tiny_model))
    export_graphs(checkpoint, folder, precision="w8a8")
    return folder, checkpoint.spec


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_canonical_graph_has_standard_operators_only(graphs):
    folder, _ = graphs
    model = ir.load(folder / "canonical.onnx")
    assert {node.domain for node in model.graph} == {""}
    assert model.graph.opset_imports == {"": 24}


def test_lowering_replaces_attention_in_every_layer(graphs):
    folder, spec = graphs
    model = ir.load(folder / "canonical.onnx")
    assert operators(model).count("Attention") == spec.num_layers
    LowerToOnnxRuntime(spec)(model)
    assert operators(model).count("GroupQueryAttention") == spec.num_layers
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(operators(model))
    with pytest.raises(PreconditionError, match="Attention nodes"):
        LowerToOnnxRuntime(spec)(model)


def test_every_linear_is_a_matmul_between_dequantized_tensors(graphs):
    folder, spec = graphs
    model = ir.load(folder / "canonical.onnx")
    matmuls = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    assert set(matmuls) == {f"{linear.name}.matmul" for linear in spec.linears()}
    for node in matmuls.values():
        assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2


def test_every_weight_has_a_scale_of_its_own(graphs):
    folder, spec = graphs
    model = ir.load(folder / "canonical.onnx")
    scales = [
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "DequantizeLinear" and str(node.inputs[0].name).endswith(".weight")
    ]
    assert len(set(scales)) == len(scales) == len(list(spec.linears()))


def test_unsigned_activations_are_bit_identical(tmp_path):
    def run(model):
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        session = exact_session(path)
        # Saturating values on both sides, ties, and plain ones.
        extreme = np.array([-1000, -128.5, -128, -127.5, -0.5, 0.5, 1.5, 127, 127.5, 1000], np.float32)
        inputs = check_inputs().astype(np.float32)
        inputs[0, : len(extreme)] = extreme
        return session.run([OUTPUT], {INPUT: inputs})[0]

    model = build_integer_check("test")
    before = run(model)
    assert UnsignedActivations()(model).modified
    np.testing.assert_array_equal(run(model), before)
    assert not UnsignedActivations()(model).modified


def test_keep_layers_keeps_the_first_layers_and_the_head(graphs):
    folder, spec = graphs
    model = ir.load(folder / "lowered.onnx")
    assert KeepLayers(2, spec)(model).modified
    kept = {name for layer in range(2) for name in names.past_names(layer)}
    assert {str(v.name) for v in model.graph.inputs if str(v.name).startswith("past")} == kept
    assert operators(model).count("GroupQueryAttention") == 2
    outputs = {value.name for value in model.graph.outputs}
    assert names.HIDDEN in outputs
    assert not outputs & {names.LOGITS, names.NEXT_TOKENS, names.TOP_TOKENS}
    assert "TopK" not in operators(model)
    with pytest.raises(PreconditionError, match=r"layers\.8\.output"):
        KeepLayers(9, spec)(ir.load(folder / "lowered.onnx"))


def test_kept_layers_compute_what_they_did(graphs):
    """With all layers kept, the head on the hidden states gives the logits."""
    folder, spec = graphs
    contract = contract_of(spec)
    model = ir.load(folder / "lowered.onnx")
    KeepLayers(spec.num_layers, spec)(model)
    ir.save(model, folder / "kept.onnx")
    tokens = np.arange(9)
    seen = OnnxRuntimeSession(folder, folder / "kept.onnx", contract, exact_integers=True).run_logits(tokens, 0, 9)
    assert seen.shape == (9, spec.hidden_size + spec.num_layers * spec.layers[0].attention.query_size)
    hidden = seen[:, : spec.hidden_size]
    logits = lowered_session(folder, contract).run_logits(tokens, 0, 9)
    weights = {str(value.name): value.const_value.numpy() for value in model.graph.initializers.values()}
    canonical = ir.load(folder / "canonical.onnx").graph.initializers
    head = canonical["lm_head.weight"].const_value.numpy() * canonical["lm_head.scale"].const_value.numpy()
    assert "lm_head.weight" not in weights
    values, amax = quantize_tokens(hidden)
    # One float32 product of sums instead of integers and two scales.
    np.testing.assert_allclose(dequantize_tokens(values, amax) @ head, logits, rtol=1e-4, atol=1e-4)
