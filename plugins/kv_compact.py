"""kv_compact: after a tree was verified, the positions of its accepted path move to the front of the new ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import QuasarError

# 4-byte words of a position that one GPU program moves.
BLOCK_WORDS = 128
# Types of the GPU kernel's arguments (plugins.compiled).
ARGUMENT_TYPES = ("*i64", "*i64", "i64", "i64", "i64", "i64")


def check_path(path: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The path as int64 [n]; raises `QuasarError` unless its indices ascend from 0 or above.

    Ascending indices never lie before the place that they move to, so that moving them one after the other is safe.
    """
    indices = np.asarray(path, np.int64)
    if indices.ndim != 1 or (len(indices) and indices[0] < 0) or (np.diff(indices) <= 0).any():
        raise QuasarError(f"a tree path of {indices.tolist()} came; ascending indices of new positions were expected")
    return indices


def kv_compact(caches: Iterable[NDArray[Any]], cache_length: int, path: Sequence[int] | NDArray[np.int64]) -> None:
    """The reference, in place: in every cache [..., S, D], `cache_length + path[k]` moves to `cache_length + k`."""
    moves = [
        (cache_length + place, cache_length + index)
        for place, index in enumerate(check_path(path).tolist())
        if index != place
    ]
    if not moves:
        return
    for cache in caches:
        # A row at a time: numpy's gather of several takes twice as long as a few of these.
        for place, index in moves:
            cache[..., place, :] = cache[..., index, :]


def launch_arguments(
    cache_table: int,
    path_table: int,
    *,
    num_caches: int,
    num_heads: int,
    capacity: int,
    position_bytes: int,
    cache_length: int,
    path_length: int,
) -> tuple[tuple[int, int, int], list[int]]:
    """Grid and arguments of the GPU kernel: one program per cache, head and block of 128 words of a position.

    Args:
        cache_table: address of int64 [num_caches], the caches' addresses.
        path_table: address of int64 [path_length].
        position_bytes: bytes of a position of one head, a multiple of 4.
    """
    if position_bytes % 4:
        raise QuasarError(f"a cache position of {position_bytes} bytes came; a multiple of 4 was expected")
    words = position_bytes // 4
    grid = (num_caches, num_heads, -(-words // BLOCK_WORDS))
    return grid, [cache_table, path_table, cache_length, path_length, capacity, words]
