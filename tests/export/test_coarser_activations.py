"""The graph in which an engine drafts for itself: another operator over the same tensors."""

import onnx_ir as ir

from export.passes import CoarserActivations, LowerToNative, StoredWeights
from export.weight_file import WeightFile
from quasar.checkpoints import open_checkpoint
from tests.graphs import export_graphs


def native(folder, tiny_model, precision):
    checkpoint = open_checkpoint(str(tiny_model))
    export_graphs(checkpoint, folder, precision=precision)
    model = ir.load(folder / "canonical.onnx")
    with WeightFile(folder / "native.data", folder) as weights:
        LowerToNative(checkpoint.spec, StoredWeights(weights))(model)
    return model


def described(model):
    return [
        (node.op_type, [value and value.name for value in node.inputs], sorted(node.attributes)) for node in model.graph
    ]


def test_operators_are_renamed_and_nothing_else(tmp_path, tiny_model):
    model = native(tmp_path, tiny_model, "w4a16")
    before = described(model)
    assert CoarserActivations()(model).modified
    assert sum(kind == "W4A16BlockLinear" for kind, *_ in before) > 0
    assert described(model) == [
        ("W4A8BlockLinear" if kind == "W4A16BlockLinear" else kind, *rest) for kind, *rest in before
    ]


def test_a_graph_without_such_linears_stays(tmp_path, tiny_model):
    model = native(tmp_path, tiny_model, "w4a8")
    before = described(model)
    assert not CoarserActivations()(model).modified
    assert described(model) == before
