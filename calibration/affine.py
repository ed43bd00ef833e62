"""Symmetric INT8: a scale per output channel for weights and per token for activations, or per 32 inputs of each.

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
# Inputs that share a scale in blocks.
BLOCK = 32
# Below it a scale has few bits or none: a row's amax would round to more than 127 of them, or divide by zero.
_SMALLEST = np.finfo(np.float32).smallest_normal
_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear's weight in INT8: weight ≈ values × scale.

    `values` int8 [rows, inputs]; `scale` float32 [rows], or in blocks [rows, inputs / 32].
    """

    values: Int8
    scale: Float32


def quantize_weight(weight: Float32, *, blocks: bool = False) -> QuantizedWeight:
    """Quantize a weight float32 [rows, inputs] per row, or per row and 32 inputs.

    A scale of zeros is 1; none is subnormal. In blocks, `inputs` must be a multiple of 32.
    """
    values = np.empty(weight.shape, np.int8)
    scale = np.empty((len(weight), weight.shape[1] // BLOCK if blocks else 1), np.float32)
    # Rows are independent; some at a time, an LM head of 150,000 rows makes no copies of its own size.
    for start in range(0, len(weight), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        rows = weight[part].reshape(-1, scale.shape[1], weight.shape[1] // scale.shape[1])
        step = weight_scale(np.abs(rows).max(axis=2))
        scale[part] = step
        values[part] = np.clip(np.rint(rows / step[..., None]), -QMAX, QMAX).reshape(-1, weight.shape[1])
    return QuantizedWeight(values=values, scale=scale if blocks else scale[:, 0])


def weight_scale(amax: Float32) -> Float32:
    """The scale of weights whose largest magnitude is `amax`; of zeros it is 1."""
    scale: Float32 = np.where(amax > 0, np.maximum(amax / np.float32(QMAX), _SMALLEST), np.float32(1))
    return scale


def dequantize_weight(weight: QuantizedWeight) -> Float32:
    """The float32 [rows, inputs] weight that the integers stand for."""
    scale = weight.scale.reshape(len(weight.scale), -1, 1)
    rows = weight.values.reshape(len(scale), scale.shape[1], -1).astype(np.float32)
    return (rows * scale).reshape(weight.values.shape)


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
