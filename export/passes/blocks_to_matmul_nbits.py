"""Linears in blocks of 32 as ONNX Runtime's own operator for them, MatMulNBits with 8 bits."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from calibration.affine import BLOCK
from export.builder import MICROSOFT, GraphBuilder
from export.passes.quantized_linear import quantized_linears
from export.passes.stored_weights import StoredWeights
from export.passes.walk import insert_behind, prune

# Activations in INT8, an amax for each block of a row: with blocks of 32 a row's bits do not depend on the width.
_INT8 = 4


class BlocksToMatMulNBits(InPlacePass):
    """The canonical form of a linear in blocks → com.microsoft.MatMulNBits, 8 bits, accuracy level 4.

    The operator rounds each block of a row itself, in an order of its own: now and then an integer differs by one.
    Weights are stored again, in its order, plus 128.
    """

    def __init__(self, weights: StoredWeights) -> None:
        super().__init__()
        self._weights = weights

    def ensures(self, model: ir.Model) -> None:
        """No linear in blocks is left."""
        if any(quantized_linears(model.graph, "w8a8-block")):
            raise PostconditionError("a linear in blocks is left")

    def call(self, model: ir.Model) -> PassResult:
        """Replace every linear in blocks."""
        graph = model.graph
        modified = False
        for linear in quantized_linears(graph, "w8a8-block"):
            columns = self._weights.stored(f"{linear.name}.columns", linear.weight, _columns)
            scales = self._weights.stored(f"{linear.name}.column_scales", linear.scale, np.transpose)
            for value in (columns, scales):
                graph.register_initializer(value)
            assert columns.shape is not None
            outputs, blocks, _ = columns.shape.numpy()
            new = GraphBuilder()
            [product] = new.ops(
                "MatMulNBits",
                [linear.x, columns, scales],
                f"{linear.name}.matmul",
                [str(linear.product.name)],
                {"K": blocks * BLOCK, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": _INT8},
                domain=MICROSOFT,
            )
            product.type, product.shape = linear.product.type, linear.product.shape
            ir.convenience.replace_all_uses_with(linear.product, product, replace_graph_outputs=True)
            insert_behind(graph, linear.product, new)
            modified = True
        if modified:
            graph.opset_imports[MICROSOFT] = 1
            prune(model)
        return PassResult(model, modified=modified)


def _columns(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Int8 [K, N] → uint8 [N, K / 32, 32], each value plus 128."""
    columns: NDArray[np.uint8] = np.ascontiguousarray(values.T).view(np.uint8) ^ np.uint8(0x80)
    return columns.reshape(len(columns), -1, BLOCK)
