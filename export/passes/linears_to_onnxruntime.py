"""Linears for which a precision names an operator of ONNX Runtime's own, as that operator."""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from calibration.precisions.base import ONNXRUNTIME
from export.builder import GraphBuilder
from export.passes.quantized_linear import linears_with_operator
from export.passes.stored_weights import StoredWeights
from export.passes.walk import insert_after, prune


class LinearsToOnnxRuntime(InPlacePass):
    """The canonical form of such a linear → its operator: today com.microsoft.MatMulNBits for W8A8 in blocks.

    Weights are stored again, in the operator's order.
    """

    def __init__(self, weights: StoredWeights) -> None:
        super().__init__()
        self._weights = weights

    def ensures(self, model: ir.Model) -> None:
        """None of those linears is left."""
        if any(linears_with_operator(model.graph, ONNXRUNTIME)):
            raise PostconditionError("a linear is left that ONNX Runtime has an operator for")

    def call(self, model: ir.Model) -> PassResult:
        """Replace every such linear."""
        graph = model.graph
        modified = False
        for linear, operator in linears_with_operator(graph, ONNXRUNTIME):
            assert linear.weight.shape is not None
            inputs, outputs = (int(extent) for extent in linear.weight.shape.numpy())
            tensors = self._weights.packed(graph, linear, operator, "columns", "column_scales")
            new = GraphBuilder()
            [product] = new.ops(
                operator.op_type,
                [linear.x, *tensors],
                f"{linear.name}.matmul",
                [str(linear.product.name)],
                operator.attributes(outputs, inputs),
                domain=operator.domain,
            )
            product.type, product.shape = linear.product.type, linear.product.shape
            ir.convenience.replace_all_uses_with(linear.product, product, replace_graph_outputs=True)
            insert_after(graph, linear.product, new)
            graph.opset_imports[operator.domain] = 1
            modified = True
        if modified:
            prune(model)
        return PassResult(model, modified=modified)
