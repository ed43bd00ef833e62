"""W8A8 per token: a scale for every token's activations, and for every output channel."""

from typing import TYPE_CHECKING, ClassVar

from calibration.precisions.base import (
    CUDA,
    NATIVE,
    ONNXRUNTIME,
    TENSORRT,
    AsItIs,
    LinearGraph,
    Operator,
    Value,
)
from calibration.precisions.int8 import Int8Weights, amax_of_rows, dequantized, rounded, unit_step
from plugins.cpu.library import DOMAIN
from plugins.cpu.packing import pack_weight
from plugins.gpu import packing as tiles
from quasar.numerics import Float32, QuantizedWeight, round_tokens

if TYPE_CHECKING:
    import torch


class PerToken(Int8Weights):
    """Token's activations / amax → Q/DQ with scale 1/127 → MatMul → · amax."""

    name = "w8a8-token"
    choice = "w8a8"
    help = "INT8 weights and activations, a scale per token"
    label = "tokens"
    form = "per token"
    title = f"W8A8 {form}"
    colour = "#9fc5e8"
    learns_factors = True
    clips_weights = True
    is_on_ladder = True
    lowerings: ClassVar = {
        # Fused to MatMulIntegerToFloat.
        ONNXRUNTIME: AsItIs(),
        NATIVE: Operator(
            op_type="W8A8Linear",
            domain=DOMAIN,
            pack=lambda weight, gated: (pack_weight(weight.values, gated=gated), None),
        ),
        TENSORRT: AsItIs(),
        CUDA: Operator(
            op_type="W8A8Linear",
            domain=tiles.DOMAIN,
            pack=lambda weight, gated: (
                tiles.pack_weight(weight.values, gated=gated),
                tiles.pack_channels(weight.scale, gated=gated),
            ),
        ),
    }

    def round_activations(self, x: "torch.Tensor", _static_scale: float, /) -> "torch.Tensor":
        """Each token by its own amax."""
        return round_tokens(x)

    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, _static_scale: float, /
    ) -> Value:
        """Y = MatMul(DQ(Q(x / a)), DQ(W)) · a with a = max(max|x|, 2^-14) per token.

        Dividing by the token's own amax makes the scale of the Q/DQ pair the constant 1/127: plain static Q/DQ, while
        the effective scale is one per token.
        """
        a = amax_of_rows(graph, x)
        unit = graph.op("Div", [x, a], "unit")
        activations = rounded(graph, unit, unit_step(graph))
        product = graph.op("MatMul", [activations, dequantized(graph, weight)], "matmul")
        return graph.product("Mul", [product, a])
