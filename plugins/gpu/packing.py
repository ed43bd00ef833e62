"""The order of a weight's bytes on the GPU: what one program reads lies together, in the order in which it reads."""

import numpy as np
from numpy.typing import NDArray

Int8 = NDArray[np.int8]
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


def _tiles(values: Int8) -> Int8:
    outputs, inputs = values.shape
    rows, columns = tiles_of(outputs, TILE_OUTPUTS), tiles_of(inputs, TILE_INPUTS)
    padded = np.zeros((rows * TILE_OUTPUTS, columns * TILE_INPUTS), np.int8)
    padded[:outputs, :inputs] = values
    return padded.reshape(rows, TILE_OUTPUTS, columns, TILE_INPUTS).swapaxes(1, 2)
