"""Which tokens `attend_cache` takes in one tile: those of one sequence, cut where a part of the pass ends."""

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


def tile_table(starts: Int64, tokens: int, *, reach: int, tile: int) -> tuple[Int32, tuple[int, ...]]:
    """The tiles of a pass, and how many each of its parts has.

    Args:
        starts: int64 [B + 1], where each sequence's tokens begin, ascending from 0; then how many there are.
        tokens: as many or more; those after the last sequence's are in no tile.
        reach: tokens of a part, in which the pass goes over the cache.
        tile: tokens of a tile, at most.

    Returns:
        int32 [parts · reach, 2]: first token and count of each tile. Those of a part begin at its first token's row;
        rows without a tile are zeros. A part has no more tiles than tokens.
    """
    table = np.zeros((-(-tokens // reach) * reach, 2), np.int32)
    cuts = np.unique(np.concatenate([starts, np.arange(0, starts[-1], reach)]))
    lengths = np.diff(cuts)
    each = -(-lengths // tile)
    first = np.repeat(cuts[:-1], each) + tile * _places(each)
    part = first // reach
    counts = np.bincount(part, minlength=len(table) // reach)
    rows = part * reach + _places(counts)
    table[rows, 0] = first
    table[rows, 1] = np.minimum(tile, np.repeat(cuts[1:], each) - first)
    return table, tuple(counts.tolist())


def _places(counts: Int64) -> Int64:
    """0, 1, … of each group, one after the other: int64 [sum of counts]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
