"""A whole quantized linear, from float rows to float rows: W8A8Linear, those in blocks, and W4A16BlockLinear."""

import numpy as np
from numpy.typing import NDArray

from plugins.quantize_per_token import quantize_per_token
from quasar.numerics import AMAX_FLOOR, BLOCK, UNIT_STEP, WIDE_STEP

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
# The attribute `gate`: what becomes of the first half of a linear's columns, which the other half is multiplied by.
NO_GATE, SILU, GELU = 0, 1, 2
# Of gelu's tanh: sqrt(2 / pi), and the factor on x³.
_GELU_SLOPE, _GELU_CUBE = (2 / np.pi) ** 0.5, 0.044715


def quantize_rows(x: Float32) -> tuple[Int8, Float32]:
    """Integers int8 [..., K] and a float32 [...] over the last axis: those of `quantize_per_token`, bit for bit.

    A row that holds a value that is not finite has a = NaN and zeros.
    """
    finite = np.asarray(np.isfinite(x).all(axis=-1))
    q, a = quantize_per_token(np.where(finite[..., None], x, 0))
    return q, np.where(finite, a, np.float32(np.nan))


def w8a8_linear(
    x: Float32,
    values: Int8,
    scale: Float32,
    *,
    bias: Float32 | None = None,
    residual: Float32 | None = None,
    norm: Float32 | None = None,
    epsilon: float = 0.0,
    gate: int = NO_GATE,
) -> Float32:
    """The reference: y float32 [T, N] of x [T, K], values [N, K] and scale [N].

    Args:
        bias: float32 [N], added to the product.
        residual: float32 [T, N], added last.
        norm: float32 [K], the weight of an RMS norm of x with `epsilon`.
        gate: what the first half of the columns are: `NO_GATE`, `SILU` or `GELU`; y [T, N / 2] = act(gate) · up.
    """
    q, a = quantize_rows(x if norm is None else rms_norm(x, norm, epsilon))
    sums = (q.astype(np.int64) @ values.T.astype(np.int64)).astype(np.float32)
    return _finish(sums * (UNIT_STEP * scale) * a[:, None], bias, residual, gate=gate)


def w8a8_block_linear(
    x: Float32,
    values: Int8,
    scale: Float32,
    *,
    bias: Float32 | None = None,
    residual: Float32 | None = None,
    norm: Float32 | None = None,
    epsilon: float = 0.0,
    gate: int = NO_GATE,
    offset: Float32 | None = None,
) -> Float32:
    """As `w8a8_linear`, with one scale for every 32 inputs; blocks are added in order.

    `scale` is float32 [N, ceil(K / 32)]; a row has the amax of each of its blocks. `offset`, the same shape, is added
    to the weights: what it makes of a block is added after the block's product.
    """
    h = x if norm is None else rms_norm(x, norm, epsilon)
    inputs = -(-h.shape[1] // BLOCK) * BLOCK
    rows = np.zeros((len(h), inputs), np.float32)
    rows[:, : h.shape[1]] = h
    weights = np.zeros((len(values), inputs), np.int8)
    weights[:, : values.shape[1]] = values
    q, a = quantize_rows(rows.reshape(len(h), -1, BLOCK))
    sums = np.einsum("tbk,nbk->tnb", q.astype(np.int64), weights.reshape(len(values), -1, BLOCK).astype(np.int64))
    y = np.zeros((len(h), len(values)), np.float32)
    for block in range(inputs // BLOCK):
        factor = (UNIT_STEP * scale[:, block])[None, :] * a[:, block, None]
        y = (sums[:, :, block].astype(np.float64) * factor + y).astype(np.float32)
        if offset is not None:
            total = q[:, block].sum(axis=-1, dtype=np.int64).astype(np.float32) * a[:, block]
            shift = (UNIT_STEP * offset[:, block]).astype(np.float32)
            y = (total[:, None].astype(np.float64) * shift + y).astype(np.float32)
    return _finish(y, bias, residual, gate=gate)


def w4a16_block_linear(
    x: Float32,
    values: Int8,
    scale: Float32,
    *,
    bias: Float32 | None = None,
    residual: Float32 | None = None,
    norm: Float32 | None = None,
    epsilon: float = 0.0,
    gate: int = NO_GATE,
    offset: Float32 | None = None,
) -> Float32:
    """As `w8a8_block_linear` of weights with 4 bits, K a multiple of 32, and rows whose blocks have 16 bits."""
    h = x if norm is None else rms_norm(x, norm, epsilon)
    q, a = quantize_wide(h.reshape(len(h), -1, BLOCK))
    blocks = values.reshape(len(values), -1, BLOCK).astype(np.int64)
    y = np.zeros((len(h), len(values)), np.float32)
    for block in range(q.shape[1]):
        sums = (q[:, block].astype(np.int64) @ blocks[:, block].T).astype(np.float64)
        factor = (np.float32(WIDE_STEP) * scale[:, block]).astype(np.float32)[None, :] * a[:, block, None]
        y = (sums * factor.astype(np.float64) + y).astype(np.float32)
        if offset is not None:
            total = q[:, block].sum(axis=-1, dtype=np.int64).astype(np.float32) * a[:, block]
            shift = (np.float32(WIDE_STEP) * offset[:, block]).astype(np.float32)
            y = (total[:, None].astype(np.float64) * shift + y).astype(np.float32)
    return _finish(y, bias, residual, gate=gate)


def quantize_wide(blocks: Float32) -> tuple[NDArray[np.int32], Float32]:
    """Integers int32 [..., 32] within ±`WIDE_MAX`, and a float32 [...], as `quantize_rows` has those of 8 bits."""
    finite = np.asarray(np.isfinite(blocks).all(axis=-1))
    known = np.where(finite[..., None], blocks, 0).astype(np.float32)
    a = np.abs(known).max(axis=-1).clip(AMAX_FLOOR).astype(np.float32)
    q = (known / a[..., None] / np.float32(WIDE_STEP)).round().astype(np.int32)
    return q, np.where(finite, a, np.float32(np.nan))


def rms_norm(x: Float32, weight: Float32, epsilon: float) -> Float32:
    """The RMS norm over the last axis: x / sqrt(mean(x²) + epsilon) · weight."""
    mean = np.square(x, dtype=np.float64).mean(axis=-1, keepdims=True)
    normed: Float32 = (x / np.sqrt(mean + epsilon) * weight).astype(np.float32)
    return normed


def silu(x: Float32) -> Float32:
    """X / (1 + e^-x)."""
    with np.errstate(over="ignore"):
        y: Float32 = x / (1 + np.exp(-x))
    return y


def gelu_tanh(x: Float32) -> Float32:
    """X (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x³): `Gelu(approximate="tanh")` of ONNX.

    Computed in float64 as x / (1 + e^-2u), which has digits where tanh(u) is near -1. Below -16 it is 0.
    """
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        exponential = np.exp(-2 * _GELU_SLOPE * (wide + _GELU_CUBE * wide**3))
    return np.where(wide < -16, 0, wide / (1 + exponential)).astype(np.float32)


def _finish(y: Float32, bias: Float32 | None, residual: Float32 | None, *, gate: int) -> Float32:
    if bias is not None:
        y = y + bias
    if gate != NO_GATE:
        x, up = np.split(y, 2, axis=-1)
        y = (silu(x) if gate == SILU else gelu_tanh(x)) * up
    return y if residual is None else residual + y
