"""Symmetric INT8 and INT4: what numbers are, defined once. The C++ and Triton kernels are tested against this file.

A scale belongs to an output channel of a weight or to a token, or to 32 inputs of either. Rounding is half to even, as
ONNX QuantizeLinear rounds. Functions on `Array` take numpy arrays and torch tensors alike, float32, and give the same
bits for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Array = TypeVar("Array", Float32, "torch.Tensor")

# The largest integer. Weights use [-127, 127]; activations saturate at -128, as QuantizeLinear does.
QMAX = 127
LOWEST = -128
# The smallest normal FP16 number: a row of zeros must not divide by zero, in any dtype.
AMAX_FLOOR = 2.0**-14
# Inputs that share a scale in blocks.
BLOCK = 32
# The float32 next to 1/127: the scale of a row that was divided by its own amax.
UNIT_STEP = float(np.float32(1) / np.float32(QMAX))
# Activations of 16 bits are 256 times an integer from -127 to 127 and one from -128 to 127: the largest of them, and
# the step of a block that was divided by its own amax.
WIDE_MAX = 127 * 256 + 127
WIDE_STEP = float(np.float32(1) / np.float32(WIDE_MAX))
# A smaller scale is subnormal: it has few bits, and integers above 127 would stand for the largest weight.
SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)
# 4-bit weights: integers from -8 to 7 under scales that are stored as float16.
LOWEST_NIBBLE, HIGHEST_NIBBLE = -8, 7
# How far the next float16 is from a number, of the number itself, where it is not subnormal.
HALF_STEP = 2.0**-11
# The smallest float16 above 0, and the largest.
_SMALLEST_HALF, _LARGEST_HALF = 2.0**-24, 65504.0
# Rows of a weight that are quantized at a time.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear's weight in INT8, or in INT4: weight ≈ values × scale, or values × scale + offset.

    `values` int8 [outputs, inputs]; `scale` float32 [outputs], or in groups of inputs [outputs, groups]; `offset`
    float32 [outputs, groups], or None where there are none.
    """

    values: Int8
    scale: Float32
    offset: Float32 | None = None


def nearest(x: Array, step: "Array | float", lowest: int = -QMAX) -> Array:
    """The integers nearest to x / step, from `lowest` to 127, as float32 in the shape of x."""
    return (x / step).round().clip(lowest, QMAX)


def split(x: Array, parts: int) -> Array:
    """[..., inputs] → [..., parts, inputs / parts]."""
    return x.reshape((*x.shape[:-1], parts, -1))


def weight_scale(amax: Array) -> Array:
    """The scale of weights whose largest magnitude is `amax`, float32 [...]; of zeros it is 1, and never subnormal."""
    scale = (amax / QMAX).clip(SMALLEST_SCALE)
    scale[amax == 0] = 1
    return scale


def scales_of(weight: Array, *, blocks: bool = False) -> Array:
    """Scales float32 [outputs, scales] of a weight [outputs, inputs]: one per row, or per row and 32 inputs."""
    parts = weight.shape[1] // BLOCK if blocks else 1
    return weight_scale(_largest(split(weight, parts))[..., 0])


def apply_scale(values: Array, scale: Array) -> Array:
    """The weight float32 [outputs, inputs] that integers (as float32) stand for under scales [outputs, scales]."""
    return (split(values, scale.shape[1]) * scale[..., None]).reshape(values.shape)


def as_half(x: Array) -> Array:
    """The float16 next to every value, as float32; larger ones become the largest float16."""
    within = x.clip(-_LARGEST_HALF, _LARGEST_HALF)
    if isinstance(within, np.ndarray):
        halves: Float32 = within.astype(np.float16).astype(np.float32)
        return halves
    return within.half().float()


def stored_nibble_scales(scale: Array) -> Array:
    """Scales of 4-bit weights as they are stored: the float16 next to each, and the smallest where that is 0."""
    stored = as_half(scale)
    stored[stored == 0] = _SMALLEST_HALF
    return stored


def nibble_scale(extreme: Array) -> Array:
    """The scale of weights, float32 [...], of which `extreme` has the largest magnitude: it becomes -8.

    So scales have the other sign of it, and one integer more than a scale of amax / 7 would leave. They are float16
    numbers; of zeros it is 1.
    """
    scale = stored_nibble_scales((extreme / LOWEST_NIBBLE).clip(-_LARGEST_HALF, _LARGEST_HALF))
    scale[extreme == 0] = 1
    return scale


def nibble_scales_of(weight: Array, group: int) -> Array:
    """Scales float32 [outputs, inputs / group] of 4-bit weights [outputs, inputs]."""
    grouped = split(weight, weight.shape[1] // group)
    if isinstance(grouped, np.ndarray):
        low, high = grouped.min(axis=-1), grouped.max(axis=-1)
        extremes: Float32 = np.where(-low > high, low, high)
        return nibble_scale(extremes)
    low, high = grouped.aminmax(dim=-1)
    return nibble_scale(low.where(-low > high, high))


def nearest_nibble(x: Array, step: "Array | float") -> Array:
    """The integers nearest to x / step, from -8 to 7, as float32 in the shape of x."""
    return (x / step).round().clip(LOWEST_NIBBLE, HIGHEST_NIBBLE)


def quantize_nibbles(weight: Float32, group: int) -> QuantizedWeight:
    """Quantize a weight float32 [outputs, inputs] to 4 bits per row and `group` inputs, of which it has a multiple."""
    return _quantize(weight, weight.shape[1] // group, lambda rows: nibble_scales_of(rows, group), nearest_nibble)


def quantize_weight(weight: Float32, *, blocks: bool = False) -> QuantizedWeight:
    """Quantize a weight float32 [outputs, inputs] per row, or per row and 32 inputs, of which it has a multiple."""
    parts = weight.shape[1] // BLOCK if blocks else 1
    quantized = _quantize(weight, parts, lambda rows: scales_of(rows, blocks=blocks), nearest)
    return quantized if blocks else QuantizedWeight(values=quantized.values, scale=quantized.scale[:, 0])


def _quantize(
    weight: Float32,
    parts: int,
    scales: Callable[[Float32], Float32],
    integers: Callable[[Float32, Float32], Float32],
) -> QuantizedWeight:
    """With so many scales a row; `scales` [rows, parts] and `integers`, by steps that broadcast, of some rows."""
    values = np.empty(weight.shape, np.int8)
    scale = np.empty((len(weight), parts), np.float32)
    # Rows are independent; some at a time, an LM head of 150,000 rows makes no copies of its own size.
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        scale[rows] = scales(weight[rows])
        values[rows] = integers(split(weight[rows], parts), scale[rows, :, None]).reshape(weight[rows].shape)
    return QuantizedWeight(values=values, scale=scale)


def dequantize_weight(weight: QuantizedWeight) -> Float32:
    """The float32 [outputs, inputs] weight that the integers stand for."""
    return with_offset(
        apply_scale(weight.values.astype(np.float32), weight.scale.reshape(len(weight.scale), -1)), weight.offset
    )


def with_offset(weight: Float32, offset: Float32 | None) -> Float32:
    """A weight [outputs, inputs] and what is added to each group of its inputs, [outputs, groups] or None."""
    if offset is None:
        return weight
    shifted: Float32 = (split(weight, offset.shape[1]) + offset[..., None]).reshape(weight.shape)
    return shifted


def row_amax(x: Array) -> Array:
    """max(max|x|, 2^-14) over the last axis, kept as an axis of 1."""
    return _largest(x).clip(AMAX_FLOOR)


def unit_integers(x: Array) -> tuple[Array, Array]:
    """Per-token integers, as float32 [..., inputs], and each row's amax float32 [..., 1].

    The row is divided by its own amax first, so that the scale of the Q/DQ pair is the constant 1/127.
    """
    amax = row_amax(x)
    return nearest(x / amax, UNIT_STEP, LOWEST), amax


def quantize_tokens(x: Float32) -> tuple[Int8, Float32]:
    """Quantize activations float32 [..., inputs] per token: (int8 [..., inputs], amax float32 [..., 1])."""
    values, amax = unit_integers(x)
    return values.astype(np.int8), amax


def dequantize_tokens(values: Int8, amax: Float32) -> Float32:
    """The float32 activations that per-token integers stand for."""
    return _times_amax(values.astype(np.float32), amax)


def round_tokens(x: Array) -> Array:
    """Activations [..., inputs] as their per-token integers stand for them: quantized and dequantized."""
    return _times_amax(*unit_integers(x))


def round_blocks(x: Array) -> Array:
    """The same with an amax for every 32 inputs of a row."""
    return round_tokens(split(x, x.shape[-1] // BLOCK)).reshape(x.shape)


def static_scale_of(amax: float) -> float:
    """The one scale of activations whose largest magnitude is `amax`."""
    return max(amax, AMAX_FLOOR) / QMAX


def round_static(x: Array, scale: float) -> Array:
    """Activations as integers under one scale stand for them; larger ones saturate."""
    return nearest(x, scale, LOWEST) * scale


def _times_amax(values: Array, amax: Array) -> Array:
    return values * UNIT_STEP * amax


def _largest(x: Array) -> Array:
    """max|x| over the last axis, kept as an axis of 1."""
    if isinstance(x, np.ndarray):
        largest: Float32 = np.abs(x).max(axis=-1, keepdims=True)
        return largest
    return x.abs().amax(-1, keepdim=True)
