"""The small graph that `engines.probes.integer_check` runs: one linear in the Q/DQ form of the verifier's own."""

import numpy as np
import onnx_ir as ir

from calibration.precisions.int8 import ZERO_POINT
from engines.probes.integer_check import INPUT, OUTPUT, check_weights
from export.builder import GraphBuilder


def build_integer_check(producer_version: str) -> ir.Model:
    """Values float32 [rows, 512] of whole numbers → sums float32 [rows, 64] of their products with the weights."""
    graph = GraphBuilder()
    weights = check_weights()
    x = graph.input(INPUT, ir.DataType.FLOAT, ["rows", weights.shape[0]])
    one = graph.constant("one", np.asarray(1, np.float32))
    zero = graph.constant(ZERO_POINT, np.asarray(0, np.int8))
    quantized = graph.op("QuantizeLinear", [x, one, zero], "quantized")
    activations = graph.op("DequantizeLinear", [quantized, one, zero], "activations")
    ones = graph.constant("ones", np.ones(weights.shape[1], np.float32))
    floats = graph.op("DequantizeLinear", [graph.constant("weights", weights), ones], "floats", {"axis": 1})
    sums = graph.op("MatMul", [activations, floats], OUTPUT)
    graph.output(sums, ir.DataType.FLOAT, ["rows", weights.shape[1]])
    return graph.model("integer_check", producer_version)
