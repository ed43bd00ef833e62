"""Symmetric INT8: one scale per output channel for weights, one per token for activations.

Rounding is half to even and the range is [-127, 127], as ONNX QuantizeLinear gives for a scale of amax / 127.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]

QMAX = 127
# The smallest normal FP16 number: a zero row must not divide by zero, in any dtype.
AMAX_FLOOR = 2.0**-14
# Below it a scale has few bits or none: a row's amax would round to more than 127 of them, or divide by zero.
_SMALLEST = np.finfo(np.float32).smallest_normal
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear's weight in INT8: `values` int8 [rows, inputs], `scale` float32 [rows]; weight ≈ values × scale."""

    values: Int8
    scale: Float32


def quantize_weight(weight: Float32) -> QuantizedWeight:
    """Quantize a weight float32 [rows, inputs] per row. A row of zeros gets the scale 1; no scale is subnormal."""
    values = np.empty(weight.shape, np.int8)
    scale = np.empty(len(weight), np.float32)
    # Rows are independent; in blocks, an LM head of 150,000 rows makes no copies of its own size.
    for start in range(0, len(weight), _BLOCK_ROWS):
        block = weight[start : start + _BLOCK_ROWS]
        amax = np.abs(block).max(axis=1)
        step = np.where(amax > 0, np.maximum(amax / np.float32(QMAX), _SMALLEST), np.float32(1))
        scale[start : start + _BLOCK_ROWS] = step
        values[start : start + _BLOCK_ROWS] = np.clip(np.rint(block / step[:, None]), -QMAX, QMAX)
    return QuantizedWeight(values=values, scale=scale)


def dequantize_weight(weight: QuantizedWeight) -> Float32:
    """The float32 [rows, inputs] weight that the integers stand for."""
    return weight.values.astype(np.float32) * weight.scale[:, None]


def quantize_tokens(activations: Float32) -> tuple[Int8, Float32]:
    """Quantize activations float32 [..., channels] per token: (int8 [..., channels], amax float32 [..., 1]).

    The row is divided by its own amax first, so that the scale of the Q/DQ pair is the constant 1 / 127.
    """
    amax = np.maximum(np.abs(activations).max(axis=-1, keepdims=True), np.float32(AMAX_FLOOR))
    step = np.float32(1) / np.float32(QMAX)
    values = np.clip(np.rint(activations / amax / step), -128, QMAX).astype(np.int8)
    return values, amax


def dequantize_tokens(values: Int8, amax: Float32) -> Float32:
    """The float32 activations that per-token integers stand for."""
    return values.astype(np.float32) * (np.float32(1) / np.float32(QMAX)) * amax
