"""Weights as the native linears read them: tiles of 32 columns, four inputs of a column side by side."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quasar.errors import QuasarError
from quasar.numerics import BLOCK

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Scale = TypeVar("Scale", np.float32, np.float16)

TILE = 32
# Four products of a column are one step of an integer dot product.
STEP = 4
MOST_INPUTS = 65536


def pack_weight(values: Int8, *, gated: bool = False, blocks: bool = False) -> UInt8:
    """Weights int8 [N, K] → uint8 [tiles, padded K / 4, 32, 4], each value plus 128.

    Columns are padded to tiles of 32 and inputs to a multiple of 4, or of 32 where `blocks` share a scale. With
    `gated` the first half of the columns are gates: their tiles and those of the second half alternate.

    Raises `QuasarError` if K is above 65536, where sums would leave 32 bits.
    """
    outputs, inputs = values.shape
    if inputs > MOST_INPUTS:
        raise QuasarError(f"a linear of {inputs} inputs came; at most {MOST_INPUTS} were expected")
    if gated:
        gate, up = (pack_weight(half, blocks=blocks) for half in np.split(values, 2))
        return np.stack([gate, up], axis=1).reshape(-1, *gate.shape[1:])
    unit = BLOCK if blocks else STEP
    padded = np.zeros((-(-outputs // TILE) * TILE, -(-inputs // unit) * unit), np.int8)
    padded[:outputs, :inputs] = values
    tiles = padded.reshape(-1, TILE, padded.shape[1] // STEP, STEP).transpose(0, 2, 1, 3)
    packed: UInt8 = np.ascontiguousarray(tiles).view(np.uint8) ^ np.uint8(0x80)
    return packed


def pack_nibbles(values: Int8, *, gated: bool = False) -> UInt8:
    """Weights int8 [N, K] from -8 to 7 → uint8 [tiles, padded K / 4, 16, 4], two of a tile's columns a byte.

    A byte holds a weight plus 8 of columns 0 to 15 in its low bits, of columns 16 to 31 in its high ones. Inputs are
    padded to a multiple of 32. Raises `QuasarError` if K is above 65536.
    """
    whole = pack_weight(values, gated=gated, blocks=True) - np.uint8(0x80 - 8)
    low, high = np.split(whole, 2, axis=2)
    packed: UInt8 = low | high << np.uint8(4)
    return packed


def pack_block_scales(scales: NDArray[Scale], *, gated: bool = False) -> NDArray[Scale]:
    """Scales [N, groups] → [tiles, groups, 32], of the same type; a group is a block of 32 inputs, or some of them."""
    if gated:
        gate, up = (pack_block_scales(half) for half in np.split(scales, 2))
        return np.stack([gate, up], axis=1).reshape(-1, *gate.shape[1:])
    outputs, groups = scales.shape
    padded = np.zeros((-(-outputs // TILE) * TILE, groups), scales.dtype)
    padded[:outputs] = scales
    return np.ascontiguousarray(padded.reshape(-1, TILE, groups).transpose(0, 2, 1))


def unpack_weight(packed: UInt8, outputs: int, inputs: int, *, gated: bool = False) -> Int8:
    """Int8 [outputs, inputs] of what `pack_weight` made of it."""
    if gated:
        return np.concatenate([unpack_weight(packed[half::2], outputs // 2, inputs) for half in range(2)])
    values = (packed ^ np.uint8(0x80)).view(np.int8).transpose(0, 2, 1, 3)
    return values.reshape(len(packed) * TILE, -1)[:outputs, :inputs]


def unpack_nibbles(packed: UInt8, outputs: int, inputs: int, *, gated: bool = False) -> Int8:
    """Int8 [outputs, inputs] of what `pack_nibbles` made of it."""
    pairs = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2)
    return unpack_weight(pairs + np.uint8(0x80 - 8), outputs, inputs, gated=gated)


def unpack_block_scales(packed: NDArray[Scale], outputs: int, *, gated: bool = False) -> NDArray[Scale]:
    """Scales [outputs, groups] of what `pack_block_scales` made of them."""
    if gated:
        return np.concatenate([unpack_block_scales(packed[half::2], outputs // 2) for half in range(2)])
    return packed.transpose(0, 2, 1).reshape(len(packed) * TILE, -1)[:outputs]
