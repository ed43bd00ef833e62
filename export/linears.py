"""One linear in the canonical graph: float, or W8A8 with a scale per token, per block of 32, or for all activations.

What each precision becomes on a back end:

    precision    canonical form                                ONNX Runtime            native        TensorRT
    w8a8-token   row / amax → Q/DQ with scale 1/127 → MatMul   MatMulIntegerToFloat    W8A8Linear       as it is
    w8a8-static  Q/DQ with one constant scale → MatMul         MatMulIntegerToFloat    as it is         as it is
    w8a8-block   blocks of a row / their amax → Q/DQ → MatMul  MatMulNBits, 8 bits     W8A8BlockLinear  refused
    float        MatMul                                        as it is                as it is         in 16 bits
"""

import numpy as np
import onnx_ir as ir

from calibration.affine import AMAX_FLOOR, BLOCK, QMAX, QuantizedWeight
from calibration.weights import PreparedLinear
from export.builder import GraphBuilder
from export.names import TOKEN_ZERO_POINT
from export.weight_file import WeightFile


def add_linear(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, linear: PreparedLinear, output: str
) -> ir.Value:
    """Y = x Wᵀ + bias for x float [..., inputs]; the last node's value takes the name `output`."""
    product = output if linear.bias is None else f"{name}.product"
    if not isinstance(linear.weight, QuantizedWeight):
        weight = graph.weight(weights.append(f"{name}.weight", linear.weight.T))
        y = graph.op("MatMul", [x, weight], product)
    elif linear.precision == "w8a8-block":
        y = _blocks(graph, weights, name, x, linear.weight, product)
    elif linear.precision == "w8a8-static":
        y = _static(graph, weights, name, x, linear, product)
    else:
        y = _per_token(graph, weights, name, x, linear.weight, product)
    if linear.bias is None:
        return y
    bias = graph.weight(weights.append(f"{name}.bias", linear.bias))
    return graph.op("Add", [y, bias], output)


def _per_token(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, weight: QuantizedWeight, output: str
) -> ir.Value:
    """Y = MatMul(DQ(Q(x / a)), DQ(W)) · a with a = max(max|x|, 2^-14) per row.

    Dividing by the row's own amax makes the scale of the Q/DQ pair the constant 1/127: plain static Q/DQ, while the
    effective scale is one per token.
    """
    a = amax_of_rows(graph, name, x)
    unit = graph.op("Div", [x, a], f"{name}.unit")
    activations = _rounded(graph, name, unit, _unit_step(graph))
    product = graph.op("MatMul", [activations, _dequantized(graph, weights, name, weight)], f"{name}.matmul")
    return graph.op("Mul", [product, a], output)


def _blocks(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, weight: QuantizedWeight, output: str
) -> ir.Value:
    """As per token, with an amax of its own for every 32 inputs of a row, and a scale for every 32 of a channel."""
    blocks = graph.op("Reshape", [x, graph.constant("split_blocks", [0, 0, -1, BLOCK])], f"{name}.blocks")
    a = amax_of_rows(graph, name, blocks)
    unit = graph.op("Div", [blocks, a], f"{name}.unit")
    rounded = graph.op("Mul", [_rounded(graph, name, unit, _unit_step(graph)), a], f"{name}.rounded_blocks")
    inputs = weight.values.shape[1]
    merged = graph.constant(f"merge_blocks.{inputs}", [0, 0, inputs])
    rounded = graph.op("Reshape", [rounded, merged], f"{name}.rounded")
    floats = _dequantized(graph, weights, name, weight)
    return graph.ops("MatMul", [rounded, floats], f"{name}.matmul", [output])[0]


def _static(
    graph: GraphBuilder, weights: WeightFile, name: str, x: ir.Value, linear: PreparedLinear, output: str
) -> ir.Value:
    """Y = MatMul(DQ(Q(x)), DQ(W)) with one scale for every activation."""
    assert isinstance(linear.weight, QuantizedWeight)
    step = graph.constant(f"{name}.activation_scale", np.asarray(linear.static_scale, np.float32))
    floats = _dequantized(graph, weights, name, linear.weight)
    return graph.ops("MatMul", [_rounded(graph, name, x, step), floats], f"{name}.matmul", [output])[0]


def _unit_step(graph: GraphBuilder) -> ir.Value:
    return graph.constant("token_scale", np.asarray(1 / QMAX, np.float32))


def _rounded(graph: GraphBuilder, name: str, x: ir.Value, step: ir.Value) -> ir.Value:
    zero = graph.constant(TOKEN_ZERO_POINT, np.asarray(0, np.int8))
    quantized = graph.op("QuantizeLinear", [x, step, zero], f"{name}.quantized")
    return graph.op("DequantizeLinear", [quantized, step, zero], f"{name}.activations")


def _dequantized(graph: GraphBuilder, weights: WeightFile, name: str, weight: QuantizedWeight) -> ir.Value:
    values = graph.weight(weights.append(f"{name}.weight", weight.values.T))
    # A scale initializer of its own for every linear: TensorRT has crashed on shared ones.
    scale = graph.weight(weights.append(f"{name}.scale", weight.scale.T))
    attributes = {"axis": 1} if weight.scale.ndim == 1 else {"axis": 0, "block_size": BLOCK}
    return graph.op("DequantizeLinear", [values, scale], f"{name}.dequantized", attributes)


def amax_of_rows(graph: GraphBuilder, name: str, x: ir.Value) -> ir.Value:
    """max(max|x|, 2^-14) over the last axis, kept as an axis of 1."""
    floor = graph.constant("amax_floor", np.asarray(AMAX_FLOOR, np.float32))
    last = graph.constant("last_axis", [-1])
    magnitude = graph.op("Abs", [x], f"{name}.magnitude")
    largest = graph.op("ReduceMax", [magnitude, last], f"{name}.largest", {"keepdims": 1})
    return graph.op("Clip", [largest, floor], f"{name}.amax")
