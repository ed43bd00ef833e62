"""A pass's inputs in one block of pinned memory, ragged: the tokens of its sequences, one sequence after the other."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from engines.cuda.tiles import tile_table
from engines.gpu.device import Device
from engines.session import Positions
from engines.tree import pack_paths

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
# Triton's aligned loads start at multiples of this.
_ALIGNMENT = 256
# What a pass is filled up with.
_FILLING = {"token_ids": 0, "positions": 0, "destinations": -1, "committed": 1, "slots": 0}
_PER_TOKEN = ("token_ids", "positions", "destinations", "committed", "slots", "logits_rows")


def _sizes(max_tokens: int, reach: int) -> dict[str, int]:
    """Bytes of every array. Ancestors come last: only those of the tokens fed are copied."""
    tiles = -(-max_tokens // reach) * reach
    return dict.fromkeys(_PER_TOKEN, 4 * max_tokens) | {"tiles": 8 * tiles, "ancestors": 4 * max_tokens * reach}


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def input_bytes(max_tokens: int, reach: int) -> int:
    """Bytes of the whole block."""
    return sum(map(_aligned, _sizes(max_tokens, reach).values()))


class Inputs:
    """Arrays int32 of up to `max_tokens` tokens, on the host and on the device.

    Of every token fed: its id; its place on its path, which is its rotary position; where its keys and values go; up
    to which place the path lies in the cache as it is; the slot of its sequence. `ancestors` [tokens, reach] is read of
    trees alone. `tiles` [parts · reach, 2]: `engines.cuda.tiles`. `logits_rows`: the tokens whose logits are asked for.

    A pass may be filled up with tokens of no sequence: id 0 at position 0, whose keys and values go nowhere.
    """

    def __init__(self, device: Device, contract: Contract, max_tokens: int, tile: int) -> None:
        """`tile`: tokens of a tile of `attend_cache`."""
        self._device, self._contract, self._reach, self._tile = device, contract, contract.max_width, tile
        sizes = _sizes(max_tokens, self._reach)
        offsets = dict(zip(sizes, accumulate(map(_aligned, sizes.values()), initial=0), strict=False))
        total = input_bytes(max_tokens, self._reach)
        self._host = device.pinned(total)
        self._address = device.allocate(total)
        self._arrays: dict[str, Int32] = {
            name: self._host[offset : offset + sizes[name]].view(np.int32) for name, offset in offsets.items()
        }
        self._ancestors = self._arrays["ancestors"].reshape(max_tokens, self._reach)
        self._tiles = self._arrays["tiles"].reshape(-1, 2)
        self._before_ancestors = offsets["ancestors"]
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        self._count = np.arange(max_tokens, dtype=np.int32)
        # By width: the tiles of one sequence alone.
        self._alone: dict[int, tuple[Int32, tuple[int, ...]]] = {}

    def fill(self, batch: Sequence[Positions], tokens: int, rows: int) -> tuple[int, ...]:
        """Write a pass of a checked batch, filled up to so many tokens and rows; its tiles in each part.

        Raises `GenerationError` for trees that do not fit.
        """
        arrays, widths, wanted = self._arrays, [len(one.tokens) for one in batch], [one.num_logits for one in batch]
        starts = list(accumulate(widths, initial=0))
        fed, num_logits = starts[-1], sum(wanted)
        destinations, positions, committed = (arrays[name][:fed] for name in ("destinations", "positions", "committed"))
        np.concatenate([one.tokens for one in batch], out=arrays["token_ids"][:fed])
        offsets = [one.cache_length - start for one, start in zip(batch, starts, strict=False)]
        np.add(self._count[:fed], _spread(offsets, widths), out=destinations)
        arrays["slots"][:fed] = _spread([one.slot for one in batch], widths)
        positions[:] = destinations
        # A chain's whole path lies in order.
        np.add(positions, 1, out=committed)
        if any(one.parents is not None for one in batch):
            self._fill_trees(batch, widths)
        # The last ones of each sequence, counted through all of them.
        before = [end - total for end, total in zip(starts[1:], accumulate(wanted), strict=True)]
        np.add(self._count[:num_logits], _spread(before, wanted), out=arrays["logits_rows"][:num_logits])
        arrays["logits_rows"][num_logits:rows] = 0
        if tokens > fed:
            for name, value in _FILLING.items():
                arrays[name][fed:tokens] = value
        table, tiles = self._tiles_of(starts, tokens)
        self._tiles[: len(table)] = table
        return tiles

    def upload(self, tokens: int) -> None:
        """Copy what a pass of so many tokens reads."""
        self._device.upload(self._address, self._host[: self._before_ancestors + 4 * tokens * self._reach])

    def _fill_trees(self, batch: Sequence[Positions], widths: list[int]) -> None:
        trees = [(one.parents, len(one.tokens)) for one in batch if one.parents is not None]
        depth, paths = pack_paths(trees, self._contract)
        is_tree = np.repeat([one.parents is not None for one in batch], widths)
        tokens = np.flatnonzero(is_tree)
        length = np.repeat([one.cache_length for one in batch], widths)[tokens]
        self._arrays["positions"][tokens] = length + depth
        self._arrays["committed"][tokens] = length
        self._ancestors[tokens] = paths

    def _tiles_of(self, starts: list[int], tokens: int) -> tuple[Int32, tuple[int, ...]]:
        if len(starts) > 2 or starts[-1] != tokens:
            return tile_table(np.array(starts), tokens, reach=self._reach, tile=self._tile)
        if tokens not in self._alone:
            self._alone[tokens] = tile_table(np.array(starts), tokens, reach=self._reach, tile=self._tile)
        return self._alone[tokens]


def _spread(values: list[int], counts: list[int]) -> Int64 | int:
    """Each value as often as its count says: int64 [sum of counts]; of one sequence, its value."""
    return values[0] if len(values) == 1 else np.repeat(np.array(values, np.int64), counts)
