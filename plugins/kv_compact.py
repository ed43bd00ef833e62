"""kv_compact: after a tree was verified, the rows of its accepted path move to the front of the new rows."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import QuasarError

# 4-byte words of a row that one GPU program moves.
BLOCK_WORDS = 128


def check_path(path: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The path as int64 [n]; raises `QuasarError` unless its rows ascend from 0 or above.

    Ascending rows never lie before the place that they move to, so that moving them one after the other is safe.
    """
    rows = np.asarray(path, np.int64)
    if rows.ndim != 1 or (len(rows) and rows[0] < 0) or (np.diff(rows) <= 0).any():
        raise QuasarError(f"a tree path of rows {rows.tolist()} came; ascending indices of new rows were expected")
    return rows


def kv_compact(caches: Iterable[NDArray[Any]], cache_length: int, path: Sequence[int] | NDArray[np.int64]) -> None:
    """The reference, in place: row `cache_length + path[k]` of every cache [..., S, D] moves to `cache_length + k`."""
    rows = check_path(path)
    kept = slice(cache_length, cache_length + len(rows))
    if np.array_equal(rows, np.arange(len(rows))):
        return
    for cache in caches:
        # numpy gathers into a new array before it assigns.
        cache[..., kept, :] = cache[..., cache_length + rows, :]


def launch_arguments(
    cache_table: int,
    path_table: int,
    *,
    num_caches: int,
    num_heads: int,
    capacity: int,
    row_bytes: int,
    cache_length: int,
    path_length: int,
) -> tuple[tuple[int, int, int], list[int]]:
    """Grid and arguments of the GPU kernel: one program per cache, head and block of 128 words of a row.

    Args:
        cache_table: address of int64 [num_caches], the caches' addresses.
        path_table: address of int64 [path_length].
        row_bytes: bytes of a row of one head, a multiple of 4.
    """
    if row_bytes % 4:
        raise QuasarError(f"a cache row of {row_bytes} bytes came; a multiple of 4 was expected")
    words = row_bytes // 4
    grid = (num_caches, num_heads, -(-words // BLOCK_WORDS))
    return grid, [cache_table, path_table, cache_length, path_length, capacity, words]
