"""Per-token activations as uint8 around 128: the form that ONNX Runtime's x86 kernels take without a conversion."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from calibration.precisions.int8 import ZERO_POINT
from export.builder import initializer

_UNSIGNED_ZERO_POINT = f"{ZERO_POINT}.unsigned"


class UnsignedActivations(InPlacePass):
    """int8 with zero point 0 → uint8 with zero point 128, in the Q/DQ pairs of activations. Numerically the same.

    q + 128 saturates where q does, and (q + 128) - 128 is q: every integer, and so every float, stays what it was.
    """

    def ensures(self, model: ir.Model) -> None:
        """No activation is quantized around the old zero point."""
        if any(_zero_point(node) == ZERO_POINT for node in model.graph):
            raise PostconditionError(f"{ZERO_POINT} is still in use")

    def call(self, model: ir.Model) -> PassResult:
        """Replace the zero point of every Q/DQ node that has it."""
        graph = model.graph
        nodes = [node for node in graph if _zero_point(node) == ZERO_POINT]
        if not nodes:
            return PassResult(model, modified=False)
        shifted = initializer(ir.tensor(np.asarray(128, np.uint8), name=_UNSIGNED_ZERO_POINT))
        graph.register_initializer(shifted)
        for node in nodes:
            node.replace_input_with(2, shifted)
        del graph.initializers[ZERO_POINT]
        for node in nodes:
            if node.op_type == "QuantizeLinear":
                node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        return PassResult(model, modified=True)


def _zero_point(node: ir.Node) -> str | None:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) == 3 and node.inputs[2] is not None:
        return node.inputs[2].name
    return None
