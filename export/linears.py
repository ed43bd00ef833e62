"""One linear in the canonical graph, float or W8A8 per token."""

import numpy as np
import onnx_ir as ir

from calibration.affine import AMAX_FLOOR, QMAX, QuantizedWeight
from calibration.weights import PreparedLinear
from export.builder import GraphBuilder
from export.names import TOKEN_ZERO_POINT
from export.weight_file import WeightFile


def add_linear(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, linear: PreparedLinear, output: str
) -> ir.Value:
    """Y = x Wᵀ + bias for x float [..., inputs]; the last node's value takes the name `output`."""
    product = output if linear.bias is None else f"{name}.product"
    if isinstance(linear.weight, QuantizedWeight):
        y = _w8a8(graph, weights, name, x, linear.weight, product)
    else:
        weight = graph.weight(weights.append(f"{name}.weight", linear.weight.T))
        y = graph.op("MatMul", [x, weight], product)
    if linear.bias is None:
        return y
    bias = graph.weight(weights.append(f"{name}.bias", linear.bias))
    return graph.op("Add", [y, bias], output)


def _w8a8(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, weight: QuantizedWeight, output: str
) -> ir.Value:
    """Y = MatMul(DQ(Q(x / a)), DQ(W)) · a with a = max(max|x|, 2^-14) per row.

    Dividing by the row's own amax makes the scale of the Q/DQ pair the constant 1/127: plain static Q/DQ, while the
    effective scale is one per token.
    """
    a = amax_of_rows(graph, name, x)
    step = graph.constant("token_scale", np.asarray(1 / QMAX, np.float32))
    zero = graph.constant(TOKEN_ZERO_POINT, np.asarray(0, np.int8))
    unit = graph.op("Div", [x, a], f"{name}.unit")
    quantized = graph.op("QuantizeLinear", [unit, step, zero], f"{name}.quantized")
    activations = graph.op("DequantizeLinear", [quantized, step, zero], f"{name}.activations")
    values = graph.weight(weights.append(f"{name}.weight", weight.values.T))
    # A scale initializer of its own for every linear: TensorRT has crashed on shared ones.
    scale = graph.weight(weights.append(f"{name}.scale", weight.scale))
    floats = graph.op("DequantizeLinear", [values, scale], f"{name}.dequantized", {"axis": 1})
    product = graph.op("MatMul", [activations, floats], f"{name}.matmul")
    return graph.op("Mul", [product, a], output)


def amax_of_rows(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """max(max|x|, 2^-14) over the last axis, kept as an axis of 1."""
    floor = graph.constant("amax_floor", np.asarray(AMAX_FLOOR, np.float32))
    last = graph.constant("last_axis", [-1])
    magnitude = graph.op("Abs", [x], f"{name}.magnitude")
    largest = graph.op("ReduceMax", [magnitude, last], f"{name}.largest", {"keepdims": 1})
    return graph.op("Clip", [largest, floor], f"{name}.amax")
