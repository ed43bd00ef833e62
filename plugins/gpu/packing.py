"""The order of a weight's bytes on the GPU: what one program reads lies together, in the order in which it reads."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quasar.numerics import BLOCK

Int8 = NDArray[np.int8]
Scale = TypeVar("Scale", np.float32, np.float16)
# The domain of operators whose weights are packed so.
DOMAIN = "quasar.cuda"
# A tile: so many outputs, each with so many inputs in a row. 64 is the long side of Hopper's integer product, 128 bytes
# are a line of the cache.
TILE_OUTPUTS, TILE_INPUTS = 64, 128
# Inputs of rows of int8 without padding must be a multiple of this: 16 bytes are loaded at once.
INPUT_MULTIPLE = 16


def tiles_of(extent: int, tile: int) -> int:
    """How many tiles cover so many elements."""
    return -(-extent // tile)


def pack_weight(values: Int8, *, gated: bool = False) -> Int8:
    """Int8 [outputs, inputs] → [tiles of outputs, tiles of inputs, 64, 128], zeros where the weight ends before a tile.

    `gated`: the first half of the outputs are gates; a tile of gates is followed by the tile of its ups.
    """
    halves = np.split(values, 2) if gated else [values]
    tiles = np.stack([_tiles(half) for half in halves], axis=1)
    return tiles.reshape(-1, *tiles.shape[2:])


def unpack_weight(tiles: Int8, outputs: int, inputs: int) -> Int8:
    """Int8 [outputs, inputs] of what `pack_weight` made of it, without `gated`."""
    rows, columns, _, _ = tiles.shape
    return tiles.swapaxes(1, 2).reshape(rows * TILE_OUTPUTS, columns * TILE_INPUTS)[:outputs, :inputs]


def pack_channels(values: NDArray[np.float32], *, gated: bool = False) -> NDArray[np.float32]:
    """Scales or biases float32 [outputs] in the order of `pack_weight`'s outputs, zeros after the last."""
    halves = np.split(values, 2) if gated else [values]
    tiles = tiles_of(len(halves[0]), TILE_OUTPUTS)
    padded = np.zeros((len(halves), tiles * TILE_OUTPUTS), np.float32)
    for row, half in zip(padded, halves, strict=True):
        row[: len(half)] = half
    return padded.reshape(len(halves), tiles, TILE_OUTPUTS).swapaxes(0, 1).reshape(-1)


def pack_blocks(values: Int8, *, gated: bool = False) -> Int8:
    """Int8 [outputs, inputs] → [tiles of outputs, blocks of whole tiles of inputs, 64, 32]: block after block."""
    tiles = pack_weight(values, gated=gated)
    blocks = tiles.reshape(*tiles.shape[:-1], TILE_INPUTS // BLOCK, BLOCK).swapaxes(2, 3)
    return np.ascontiguousarray(blocks.reshape(len(tiles), -1, TILE_OUTPUTS, BLOCK))


def pack_nibbles(values: Int8, *, gated: bool = False) -> Int8:
    """Int8 from -8 to 7 → [tiles of outputs, pairs of blocks, 64, 32], two inputs a byte, each plus 8.

    A byte has an input of a block in its low bits, and the same place of the next block in its high ones.
    """
    blocks = pack_blocks(values, gated=gated).view(np.uint8) + np.uint8(8)
    packed: NDArray[np.uint8] = blocks[:, ::2] | blocks[:, 1::2] << np.uint8(4)
    return packed.view(np.int8)


def pack_block_scales(scales: NDArray[Scale], *, gated: bool = False) -> NDArray[Scale]:
    """Scales [outputs, blocks] → [tiles of outputs, blocks of whole tiles of inputs, 64], of the same type."""
    halves = np.split(scales, 2) if gated else [scales]
    outputs, blocks = halves[0].shape
    tiles, of_tile = tiles_of(outputs, TILE_OUTPUTS), TILE_INPUTS // BLOCK
    padded = np.zeros((tiles, len(halves), TILE_OUTPUTS, tiles_of(blocks, of_tile) * of_tile), scales.dtype)
    for place, half in enumerate(halves):
        rows = np.zeros((tiles * TILE_OUTPUTS, padded.shape[-1]), scales.dtype)
        rows[:outputs, :blocks] = half
        padded[:, place] = rows.reshape(tiles, TILE_OUTPUTS, -1)
    return np.ascontiguousarray(padded.reshape(-1, *padded.shape[2:]).swapaxes(1, 2))


def _tiles(values: Int8) -> Int8:
    outputs, inputs = values.shape
    rows, columns = tiles_of(outputs, TILE_OUTPUTS), tiles_of(inputs, TILE_INPUTS)
    padded = np.zeros((rows * TILE_OUTPUTS, columns * TILE_INPUTS), np.int8)
    padded[:outputs, :inputs] = values
    return padded.reshape(rows, TILE_OUTPUTS, columns, TILE_INPUTS).swapaxes(1, 2)
