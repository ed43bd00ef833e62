"""Positions of a KV cache as one block, whatever memory they lie in: [layers, 2 (keys, values), G, positions, D].

A block has the cache's own type, so that what is written back has the bits that were read: float32, float16, int8, or
uint16 with the bits of bfloat16, which numpy does not have. Who compares caches of float types converts to float32
first.
"""

import contextlib
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from plugins.kv_compact import kv_compact
from quasar.errors import GenerationError

Float32 = NDArray[np.float32]
# Cache positions in the cache's own type.
CacheRows = NDArray[Any]
# Per layer keys and values, [slots, G, S, D] each.
HostCacheArrays = list[tuple[NDArray[Any], NDArray[Any]]]
# The name of a cache's type in a contract or a plan → numpy's.
CACHE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}


def new_cache(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that take memory page by page, as they are written.

    numpy asks Linux for pages of 2 MB, and one position that is written in each would take all of a slot's memory.
    """
    count = int(np.prod(shape))
    if sys.platform == "win32" or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        # A kernel without such pages refuses the advice.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


class HostCaches:
    """The caches of a session in host memory: per layer keys and values [slots, G, S, D]."""

    caches: HostCacheArrays

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None, *, slot: int = 0) -> CacheRows:
        """A copy of positions `first` to `end` of some layers, or of all."""
        self._check_slot(slot)
        chosen = self.caches if layers is None else [self.caches[layer] for layer in layers]
        return np.stack([np.stack([cache[slot, :, first:end] for cache in pair]) for pair in chosen])

    def compact(self, cache_length: int, path: Sequence[int] | NDArray[np.int64], *, slot: int = 0) -> None:
        """Move the new positions of an accepted tree path, ascending indices of the last call, to the front."""
        self._check_slot(slot)
        kv_compact((cache[slot] for pair in self.caches for cache in pair), cache_length, path)

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""
        self._check_slot(slot)
        check_dtype(rows, self.caches[0][0].dtype)
        for pair, block in zip(self.caches, rows, strict=True):
            for cache, part in zip(pair, block, strict=True):
                cache[slot, :, first : first + part.shape[1]] = part

    def _check_slot(self, slot: int) -> None:
        check_slot(slot, len(self.caches[0][0]))


def check_slot(slot: int, num_slots: int) -> None:
    """Raise `GenerationError` unless the cache has that slot."""
    if not 0 <= slot < num_slots:
        raise GenerationError(f"cache slot {slot} was named; 0 to {num_slots - 1} are there")


def check_dtype(rows: CacheRows, dtype: DTypeLike) -> None:
    """Raise `ValueError` unless the block has the cache's own type."""
    if rows.dtype != dtype:
        raise ValueError(f"cache positions are {rows.dtype}; {np.dtype(dtype)}, the cache's own type, was expected")


def to_float32(rows: CacheRows) -> Float32:
    """Cache positions as numbers, exactly."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def from_float32(rows: Float32, dtype: DTypeLike) -> CacheRows:
    """Numbers as cache positions of that type, rounded half to even; a cache holds no NaN, so none is looked for."""
    if np.dtype(dtype) != np.uint16:
        return rows.astype(dtype)
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
