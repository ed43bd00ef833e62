"""A pass's inputs in one block of pinned memory: copied to the device at once, its size the same for every pass."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from engines.gpu.device import Device
from engines.tree import ancestor_mask, depths

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
# Triton's aligned loads start at multiples of this.
_ALIGNMENT = 256


def _sizes(max_tokens: int, reach: int) -> dict[str, int]:
    """Bytes of every array."""
    names = ("token_ids", "positions", "destinations", "committed", "slots", "logits_rows")
    return dict.fromkeys(names, 4 * max_tokens) | {"ancestors": 4 * reach * reach}


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def input_bytes(max_tokens: int, reach: int) -> int:
    """Bytes of the whole block."""
    return sum(map(_aligned, _sizes(max_tokens, reach).values()))


class Inputs:
    """Arrays int32 of up to `max_tokens` tokens, on the host and on the device.

    Of every token fed: its id; its place on its path, which is its rotary position; where its keys and values go; up
    to which place the path lies in the cache as it is; the slot of its sequence. `ancestors` [tokens, reach] is read of
    trees alone. `logits_rows`: the tokens whose logits are asked for.
    """

    def __init__(self, device: Device, max_tokens: int, reach: int) -> None:
        self._device, self._reach = device, reach
        sizes = _sizes(max_tokens, reach)
        offsets = dict(zip(sizes, accumulate(map(_aligned, sizes.values()), initial=0), strict=False))
        total = input_bytes(max_tokens, reach)
        self._host = device.pinned(total)
        self._address = device.allocate(total)
        self._arrays: dict[str, Int32] = {
            name: self._host[offset : offset + sizes[name]].view(np.int32) for name, offset in offsets.items()
        }
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        self._count = np.arange(max_tokens, dtype=np.int32)

    def fill(
        self, token_ids: Sequence[int] | Int64, cache_length: int, num_logits_rows: int, parents: Int64 | None
    ) -> None:
        """Write a pass of one sequence: a chain, or a tree (engines.tree) of up to `reach` tokens."""
        width, arrays = len(token_ids), self._arrays
        arrays["token_ids"][:width] = token_ids
        np.add(self._count[:width], cache_length, out=arrays["destinations"][:width])
        np.add(self._count[:num_logits_rows], width - num_logits_rows, out=arrays["logits_rows"][:num_logits_rows])
        positions, committed = arrays["positions"][:width], arrays["committed"][:width]
        if parents is None:
            positions[:] = arrays["destinations"][:width]
            # A chain's whole path lies in order.
            np.add(positions, 1, out=committed)
            return
        positions[:] = cache_length + depths(parents)
        committed[:] = cache_length
        ancestors = arrays["ancestors"].reshape(self._reach, self._reach)
        for row, seen in enumerate(ancestor_mask(parents)):
            path = np.flatnonzero(seen)
            ancestors[row, : len(path)] = path

    def upload(self) -> None:
        """Copy the whole block."""
        self._device.upload(self._address, self._host)
