"""W8A8 with static activations: one scale, found by calibration, for all of them."""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from calibration.precisions.base import NATIVE, ONNXRUNTIME, TENSORRT, AsItIs, LinearGraph, Value
from calibration.precisions.int8 import Int8Weights, dequantized, rounded
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import Float32, QuantizedWeight, round_static

if TYPE_CHECKING:
    import torch


class Static(Int8Weights):
    """Q/DQ with one constant scale → MatMul."""

    name = "w8a8-static"
    choice = "w8a8-static"
    help = "one for all tokens"
    label = "static"
    form = "with static scales"
    title = f"W8A8 {form}"
    colour = "#d9822b"
    has_static_scale = True
    # ONNX Runtime fuses it to MatMulIntegerToFloat, in native graphs as well.
    lowerings: ClassVar = {ONNXRUNTIME: AsItIs(), NATIVE: AsItIs(), TENSORRT: AsItIs()}

    def held(self, weight: PrequantizedWeight) -> QuantizedWeight | None:  # noqa: ARG002 - whatever it is
        """No weight: its activations' scale would have to be known as well, and one per token is finer."""
        return None

    def round_activations(self, x: "torch.Tensor", static_scale: float, /) -> "torch.Tensor":
        """Larger activations saturate."""
        return round_static(x, static_scale)

    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, static_scale: float, /
    ) -> Value:
        """Y = MatMul(DQ(Q(x)), DQ(W))."""
        step = graph.constant(f"{graph.name}.activation_scale", np.asarray(static_scale, np.float32))
        floats = dequantized(graph, weight)
        return graph.product("MatMul", [rounded(graph, x, step), floats], "matmul")
