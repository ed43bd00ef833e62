"""Rows of a KV cache as one block, whatever memory they lie in: float32 [layers, 2 (keys, values), G, rows, D]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.kv_compact import kv_compact

Float32 = NDArray[np.float32]


# Per layer keys and values, [1, G, S, D] each.
HostCacheArrays = list[tuple[NDArray[Any], NDArray[Any]]]


class HostCaches:
    """The caches of a session in host memory: per layer keys and values, float32 or 16 bits [1, G, S, D].

    bfloat16, which numpy does not have, is kept as uint16.
    """

    caches: HostCacheArrays

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None) -> Float32:
        """A copy of rows `first` to `end` of some layers, or of all."""
        chosen = self.caches if layers is None else [self.caches[layer] for layer in layers]
        return np.stack([np.stack([_widened(cache[0, :, first:end]) for cache in pair]) for pair in chosen])

    def compact(self, cache_length: int, path: Sequence[int] | NDArray[np.int64]) -> None:
        """Move the new rows of an accepted tree path, ascending indices of the last call, to the front."""
        kv_compact((cache for pair in self.caches for cache in pair), cache_length, path)

    def write_rows(self, first: int, rows: Float32) -> None:
        """Overwrite the rows from `first` on, of all layers."""
        for pair, block in zip(self.caches, rows, strict=True):
            for cache, part in zip(pair, block, strict=True):
                cache[0, :, first : first + part.shape[1]] = _narrowed(part) if cache.dtype == np.uint16 else part


def _widened(rows: NDArray[Any]) -> Float32:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def _narrowed(rows: Float32) -> NDArray[np.uint16]:
    """As bfloat16, rounded half to even; the cache holds numbers alone."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
