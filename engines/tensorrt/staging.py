"""A call's inputs in one block, and its tokens in another: each is copied between host and device at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines import contract as names
from engines.gpu.device import Device

Int64 = NDArray[np.int64]
# TensorRT's tensors start at multiples of this.
_ALIGNMENT = 256


class Staging:
    """Pinned host memory and its copy on the device, for calls of up to `max_tokens` tokens."""

    def __init__(self, device: Device, max_tokens: int, max_logits_rows: int, *, tree_mask: bool) -> None:
        self._device = device
        sizes = {
            names.CACHE_LENGTHS: 8,
            names.INPUT_IDS: 8 * max_tokens,
            names.POSITION_IDS: 8 * max_tokens,
            names.LOGITS_ROWS: 8 * max_logits_rows,
        }
        if tree_mask:
            sizes[names.TREE_MASK] = max_tokens * max_tokens
        offsets, total = {}, 0
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host = device.pinned(total)
        self._address = device.allocate(total)
        self._parts = {name: self._host[offset : offset + sizes[name]] for name, offset in offsets.items()}
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        self._count = np.arange(max_tokens, dtype=np.int64)
        self._chain = np.tril(np.ones((max_tokens, max_tokens), np.bool_)) if tree_mask else None

    def fill(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        *,
        offsets: Int64 | None,
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """Write a call's inputs; `offsets` and `mask` are a tree's, None a chain's."""
        width = len(token_ids)
        self._part(names.CACHE_LENGTHS)[0] = cache_length
        self._part(names.INPUT_IDS)[:width] = token_ids
        positions = self._part(names.POSITION_IDS)[:width]
        np.add(self._count[:width] if offsets is None else offsets, cache_length, out=positions)
        np.add(
            self._count[:num_logits_rows],
            width - num_logits_rows,
            out=self._part(names.LOGITS_ROWS)[:num_logits_rows],
        )
        if self._chain is not None:
            visible = self._chain[:width, :width] if mask is None else mask
            self._parts[names.TREE_MASK][: width * width] = visible.reshape(-1)

    def shapes(self, width: int, num_logits_rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a call's inputs that change from call to call."""
        shapes: dict[str, tuple[int, ...]] = {
            names.INPUT_IDS: (1, width),
            names.POSITION_IDS: (1, width),
            names.LOGITS_ROWS: (num_logits_rows,),
        }
        if self._chain is not None:
            shapes[names.TREE_MASK] = (1, width, width)
        return shapes

    def upload(self) -> None:
        """Copy the whole block: its size does not depend on the call, so a recorded copy serves every call."""
        self._device.upload(self._address, self._host)

    def _part(self, name: str) -> Int64:
        return self._parts[name].view(np.int64)


class Tokens:
    """`next_tokens`, then `top_tokens`, of up to `max_tokens` positions: on the device, and pinned on the host."""

    def __init__(self, device: Device, max_tokens: int, top_k: int) -> None:
        self._device, self._top_k = device, top_k
        self._top_offset = -(-8 * max_tokens // _ALIGNMENT) * _ALIGNMENT
        size = self._top_offset + 8 * max_tokens * top_k
        self._host = device.pinned(size)
        self._address = device.allocate(size)
        self.addresses = {names.NEXT_TOKENS: self._address}
        if top_k:
            self.addresses[names.TOP_TOKENS] = self._address + self._top_offset

    def download(self, count: int) -> None:
        """Copy what a call wrote, in one piece up to the last position's tokens."""
        end = self._top_offset + 8 * count * self._top_k if self._top_k else 8 * count
        self._device.download(self._host[:end], self._address)

    def next_tokens(self, count: int) -> Int64:
        """A view of what was copied: int64 [M]."""
        return self._host[: 8 * count].view(np.int64)

    def top_tokens(self, count: int) -> Int64 | None:
        """A view of what was copied: int64 [M, top_k]; None where the contract has none."""
        if not self._top_k:
            return None
        values = self._host[self._top_offset :].view(np.int64)[: count * self._top_k]
        return values.reshape(count, self._top_k)
