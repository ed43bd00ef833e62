"""W8A8 in blocks of 32: a scale for every 32 inputs of a token's activations and of an output channel."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.precisions.base import CUDA, NATIVE, ONNXRUNTIME, TENSORRT, LinearGraph, Operator, Refused, Value
from calibration.precisions.int8 import Int8Weights, amax_of_rows, dequantized, rounded, unit_step
from plugins.cpu.library import DOMAIN
from plugins.cpu.packing import pack_block_scales, pack_weight
from plugins.gpu import packing as tiles
from quasar.numerics import BLOCK, Float32, Int8, QuantizedWeight, round_blocks

if TYPE_CHECKING:
    import torch

# Activations in INT8, an amax for each block of a token: with blocks of 32 its bits do not depend on the width.
_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS = 4, 1


def matmul_nbits(
    bits: int,
    pack: Callable[[QuantizedWeight, bool], tuple[NDArray[Any], NDArray[Any] | None]],
    *,
    integers: bool = True,
) -> Operator:
    """ONNX Runtime's own operator with weights of so many bits in blocks of 32; `integers`: activations in INT8."""
    return Operator(
        op_type="MatMulNBits",
        domain="com.microsoft",
        pack=pack,
        attributes=lambda outputs, inputs: {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": _INT8_ACTIVATIONS if integers else _FLOAT_ACTIVATIONS,
        },
    )


class InBlocks(Int8Weights):
    """Blocks of a token's activations / their amax → Q/DQ with scale 1/127 → MatMul."""

    name = "w8a8-block"
    choice = "w8a8-block"
    help = "per 32 values"
    label = "blocks"
    form = f"in blocks of {BLOCK}"
    title = f"W8A8 {form}"
    colour = "#3d85c6"
    in_blocks = True
    is_on_ladder = True
    input_multiple = BLOCK
    lowerings: ClassVar = {
        # The operator rounds each block itself, in an order of its own: now and then an integer differs by 1.
        ONNXRUNTIME: matmul_nbits(8, lambda weight, gated: (_columns(weight.values), weight.scale)),
        NATIVE: Operator(
            op_type="W8A8BlockLinear",
            domain=DOMAIN,
            pack=lambda weight, gated: (
                pack_weight(weight.values, gated=gated, blocks=True),
                pack_block_scales(weight.scale, gated=gated),
            ),
        ),
        TENSORRT: Refused(reason="TensorRT has no INT8 matmul with a scale per block"),
        CUDA: Operator(
            op_type="W8A8BlockLinear",
            domain=tiles.DOMAIN,
            pack=lambda weight, gated: (
                tiles.pack_blocks(weight.values, gated=gated),
                tiles.pack_block_scales(weight.scale, gated=gated),
            ),
        ),
    }

    def round_activations(self, x: "torch.Tensor", _static_scale: float, /) -> "torch.Tensor":
        """Each 32 inputs of a token by their own amax."""
        return round_blocks(x)

    def canonical(
        self, graph: LinearGraph, x: Value, weight: Float32 | QuantizedWeight, _static_scale: float, /
    ) -> Value:
        """As per token, but with an amax for every 32 inputs of a token, and a scale for every 32 of a channel."""
        blocks = graph.op("Reshape", [x, graph.constant("split_blocks", [0, 0, -1, BLOCK])], "blocks")
        a = amax_of_rows(graph, blocks)
        unit = graph.op("Div", [blocks, a], "unit")
        scaled = graph.op("Mul", [rounded(graph, unit, unit_step(graph)), a], "rounded_blocks")
        assert isinstance(weight, QuantizedWeight)
        inputs = weight.values.shape[1]
        activations = graph.op("Reshape", [scaled, graph.constant(f"merge_blocks.{inputs}", [0, 0, inputs])], "rounded")
        return graph.product("MatMul", [activations, self.weight_of(graph, weight)], "matmul")

    def weight_of(self, graph: LinearGraph, weight: QuantizedWeight) -> Value:
        """The weight [inputs, outputs] as floats."""
        return dequantized(graph, weight)


def _columns(values: Int8) -> NDArray[Any]:
    """Int8 [N, K] → uint8 [N, K / 32, 32], each value plus 128, as MatMulNBits reads it."""
    columns = np.ascontiguousarray(values).view(np.uint8) ^ np.uint8(0x80)
    return columns.reshape(len(columns), -1, BLOCK)
