"""W4A8: 4-bit weights in groups of inputs, and activations in INT8 blocks of 32."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.precisions.base import NATIVE, ONNXRUNTIME, TENSORRT, LinearGraph, Operator, Refused, Value
from calibration.precisions.block import InBlocks, matmul_nbits
from calibration.precisions.held import in_groups
from calibration.precisions.int8 import dequantized
from plugins.cpu.library import DOMAIN
from plugins.cpu.packing import pack_block_scales, pack_nibbles
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import (
    BLOCK,
    HALF_STEP,
    HIGHEST_NIBBLE,
    LOWEST_NIBBLE,
    Array,
    Float32,
    Int8,
    QuantizedWeight,
    as_half,
    nearest_nibble,
    nibble_scales_of,
    quantize_nibbles,
    stored_nibble_scales,
)

if TYPE_CHECKING:
    import torch

_HALF_BYTES = 2
_NO_TENSORRT = Refused(reason="TensorRT has no matmul of INT8 activations with INT4 weights")
# What checkpoints of the field mostly have.
_WIDE = 4 * BLOCK


def _stock(group: int) -> Operator:
    """With blocks of 32, whatever the group: with wider ones its bits depend on the width."""
    return matmul_nbits(
        4, lambda weight, gated: (_pairs(weight.values), np.repeat(weight.scale, group // BLOCK, axis=1))
    )


def _native(group: int) -> Operator:
    return Operator(
        op_type="W4A8BlockLinear",
        domain=DOMAIN,
        pack=lambda weight, gated: (
            pack_nibbles(weight.values, gated=gated),
            pack_block_scales(weight.scale.astype(np.float16), gated=gated),
        ),
        attributes=lambda outputs, inputs: {"group_size": group},
    )


class Nibbles(InBlocks):
    """Blocks of a token's activations / their amax → Q/DQ with scale 1/127 → MatMul with INT4 weights."""

    name = "w4a8"
    choice = "w4a8"
    help = f"INT4 weights in groups of {BLOCK}"
    label = "nibbles"
    form = f"in groups of {BLOCK}"
    title = f"W4A8 {form}"
    colour = "#e69138"
    weight_bits = 4
    group: ClassVar[int] = BLOCK
    clips_weights = True
    lowerings: ClassVar = {
        ONNXRUNTIME: _stock(BLOCK),
        NATIVE: _native(BLOCK),
        TENSORRT: _NO_TENSORRT,
    }

    def scales_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """One scale per row and group, a float16 number."""
        return nibble_scales_of(weight, self.group)

    def nearest(self, weight: "torch.Tensor", step: "torch.Tensor", /) -> "torch.Tensor":
        """Integers from -8 to 7."""
        return nearest_nibble(weight, step)

    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """Values int8 [outputs, inputs] with their scales."""
        return quantize_nibbles(weight, self.group)

    def stored_scales(self, scale: Array) -> Array:
        """The float16 next to each, none of them 0."""
        return stored_nibble_scales(scale)

    def held(self, weight: PrequantizedWeight) -> QuantizedWeight | None:
        """Integers of 4 bits; None where a scale is too small or too large for a float16 of full precision."""
        kept = in_groups(weight, weight.values.shape[1] / self.group, LOWEST_NIBBLE, HIGHEST_NIBBLE)
        if kept is None or (np.abs(as_half(kept.scale) - kept.scale) > HALF_STEP * np.abs(kept.scale)).any():
            return None
        return QuantizedWeight(values=kept.values, scale=as_half(kept.scale))

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """Half a byte a weight, and float16 scales."""
        return outputs * (inputs // 2 + _HALF_BYTES * (inputs // self.group))

    def weight_of(self, graph: LinearGraph, weight: QuantizedWeight) -> Value:
        """From an INT4 tensor."""
        return dequantized(graph, weight, group=self.group, bits=4)


class WideNibbles(Nibbles):
    """The same with a scale for every 128 inputs of a weight."""

    name = "w4a8-128"
    choice = "w4a8-128"
    help = f"in groups of {_WIDE}"
    label = "wide nibbles"
    form = f"in groups of {_WIDE}"
    title = f"W4A8 {form}"
    colour = "#f6b26b"
    group = _WIDE
    is_on_ladder = False
    input_multiple = _WIDE
    lowerings: ClassVar = {
        ONNXRUNTIME: _stock(_WIDE),
        NATIVE: _native(_WIDE),
        TENSORRT: _NO_TENSORRT,
    }


def _pairs(values: Int8) -> NDArray[Any]:
    """Int8 [N, K] → uint8 [N, K / 32, 16], each value plus 8, two a byte, as MatMulNBits reads it."""
    columns = (values + np.int8(8)).astype(np.uint8).reshape(len(values), -1, BLOCK)
    packed: NDArray[Any] = columns[:, :, ::2] | columns[:, :, 1::2] << np.uint8(4)
    return packed
