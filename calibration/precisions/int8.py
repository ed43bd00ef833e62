"""What the precisions with INT8 weights share: rounding of weights, and parts of their canonical forms."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from calibration.precisions.base import LinearGraph, Precision, Value
from calibration.precisions.held import grouped, in_groups
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.numerics import (
    AMAX_FLOOR,
    BLOCK,
    LOWEST,
    QMAX,
    UNIT_STEP,
    Float32,
    QuantizedWeight,
    nearest,
    quantize_weight,
    scales_of,
)

if TYPE_CHECKING:
    import torch

# The zero point of every quantized activation in a canonical graph, int8 0; lowerings look for it.
ZERO_POINT = "token_zero_point"
_SCALE_BYTES = 4


class Int8Weights(Precision):
    """Symmetric INT8 weights with a scale per output channel, or with `in_blocks` per channel and 32 inputs."""

    def scales_of(self, weight: "torch.Tensor") -> "torch.Tensor":
        """One scale per row, or per row and 32 inputs."""
        return scales_of(weight, blocks=self.in_blocks)

    def nearest(self, weight: "torch.Tensor", step: "torch.Tensor", /) -> "torch.Tensor":
        """Integers from -127 to 127."""
        return nearest(weight, step)

    def quantize(self, weight: Float32) -> Float32 | QuantizedWeight:
        """Values int8 [outputs, inputs] with their scales."""
        return quantize_weight(weight, blocks=self.in_blocks)

    def held(self, weight: PrequantizedWeight) -> QuantizedWeight | None:
        """Integers of 8 bits or fewer; a negative scale turns them around."""
        groups = weight.values.shape[1] / BLOCK if self.in_blocks else 1
        kept = in_groups(weight, groups, LOWEST, QMAX)
        if kept is None or kept.offset is not None:
            return None
        turned = np.where(kept.scale < 0, np.int8(-1), np.int8(1))
        values = grouped(kept.values, kept.scale)
        if values.min(initial=0, where=turned[..., None] < 0) == LOWEST:
            return None
        values = values * turned[..., None]
        return QuantizedWeight(values=values.reshape(kept.values.shape), scale=np.abs(kept.scale))

    def num_bytes(self, outputs: int, inputs: int) -> int:
        """One byte a weight, and float32 scales."""
        return outputs * (inputs + _SCALE_BYTES * (inputs // BLOCK if self.in_blocks else 1))


def dequantized(
    graph: LinearGraph,
    weight: Float32 | QuantizedWeight,
    *,
    group: int = BLOCK,
    stored: Literal["int8", "int4", "uint4"] = "int8",
) -> Value:
    """The weight [inputs, outputs] as floats, from tensors "weight" of the type `stored` and "scale"."""
    import ml_dtypes  # noqa: F401 - teaches numpy the names of 4-bit integers

    assert isinstance(weight, QuantizedWeight)
    values = graph.weight("weight", weight.values.T.astype(np.dtype(stored), copy=False))
    # A scale initializer of its own for every linear: TensorRT has crashed on shared ones.
    scale = graph.weight("scale", weight.scale.T)
    attributes = {"axis": 1} if weight.scale.ndim == 1 else {"axis": 0, "block_size": group}
    return graph.op("DequantizeLinear", [values, scale], "dequantized", attributes)


def amax_of_rows(graph: LinearGraph, x: Value) -> Value:
    """max(max|x|, 2^-14) over the last axis, kept as an axis of 1."""
    floor = graph.constant("amax_floor", np.asarray(AMAX_FLOOR, np.float32))
    last = graph.constant("last_axis", [-1])
    magnitude = graph.op("Abs", [x], "magnitude")
    largest = graph.op("ReduceMax", [magnitude, last], "largest", {"keepdims": 1})
    return graph.op("Clip", [largest, floor], "amax")


def unit_step(graph: LinearGraph) -> Value:
    """1/127: the scale of values that were divided by their own amax."""
    return graph.constant("token_scale", np.asarray(UNIT_STEP, np.float32))


def rounded(graph: LinearGraph, x: Value, step: Value) -> Value:
    """A Q/DQ pair: x as its integers under one scale stand for it."""
    zero = graph.constant(ZERO_POINT, np.asarray(0, np.int8))
    quantized = graph.op("QuantizeLinear", [x, step, zero], "quantized")
    return graph.op("DequantizeLinear", [quantized, step, zero], "activations")
