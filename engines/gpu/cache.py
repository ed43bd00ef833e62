"""The KV cache on a device: a buffer per layer for keys and one for values, with all slots, allocated once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines import contract as names
from engines.cache_rows import CACHE_DTYPES, CacheRows, check_dtype, check_slot
from engines.contract import Contract
from engines.gpu.device import Device, LoadedKernel
from plugins.kv_compact import check_path, launch_arguments
from quasar.errors import GenerationError

Int64 = NDArray[np.int64]


class DeviceCache:
    """Buffers [slots, G, S, D] of a type by its name in a contract; `allocate` makes them."""

    def __init__(
        self, device: Device, contract: Contract, cache_type: str, kernel: LoadedKernel | None, *, slots: int = 1
    ) -> None:
        """`kernel`: kv_compact, for trees."""
        self._device, self._contract, self._kernel, self._slots = device, contract, kernel, slots
        self._buffers: list[tuple[int, int]] = []
        self._dtype = CACHE_DTYPES[cache_type]
        self._position_bytes = contract.head_size * self._dtype.itemsize

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one position in every layer, keys and values."""
        return 2 * self._contract.num_layers * self._contract.num_kv_heads * self._position_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all positions of all slots."""
        return self._slots * self._contract.capacity * self.bytes_per_position

    @property
    def table_bytes(self) -> int:
        """Bytes beside the positions: what kv_compact is told."""
        tables = 2 * self._contract.num_layers * self._slots
        return 8 * (tables + self._contract.max_width) if self._kernel is not None else 0

    def allocate(self) -> None:
        """Make the buffers; raises `OutOfMemoryError`."""
        contract, device = self._contract, self._device
        size = self._slots * self._slot_bytes
        self._buffers = [(device.allocate(size), device.allocate(size)) for _ in range(contract.num_layers)]
        if self._kernel is not None:
            # A table for each slot: to the kernel, a slot is a cache.
            offsets = self._slot_bytes * np.arange(self._slots)[:, None]
            addresses = (np.array(self._buffers, np.int64).reshape(-1) + offsets).reshape(-1)
            self._table = device.allocate(addresses.nbytes)
            device.upload(self._table, addresses.view(np.uint8))
            self._path_host = device.pinned(8 * contract.max_width)
            self._path = device.allocate(8 * contract.max_width)
            # The table must live until it is copied.
            device.synchronize()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Addresses of every layer's keys and values."""
        return tuple(self._buffers)

    @property
    def addresses(self) -> dict[str, int]:
        """Input and output → address: past and present are one buffer."""
        found: dict[str, int] = {}
        for layer, pair in enumerate(self._buffers):
            for past, present, address in zip(names.past_names(layer), names.present_names(layer), pair, strict=True):
                found |= {past: address, present: address}
        return found

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None, *, slot: int = 0) -> CacheRows:
        """A copy of positions, of some layers or of all, in the cache's own type: [layers, 2, G, positions, D]."""
        check_slot(slot, self._slots)
        chosen, heads = range(len(self._buffers)) if layers is None else layers, self._contract.num_kv_heads
        block = np.empty((len(chosen), 2, heads, (end - first) * self._position_bytes), np.uint8)
        for index, layer in enumerate(chosen):
            for part in range(2):
                for head in range(heads):
                    self._device.download(block[index, part, head], self._address(layer, part, slot, head, first))
        self._device.synchronize()
        shape = (len(chosen), 2, heads, end - first, self._contract.head_size)
        return block.reshape(-1).view(self._dtype).reshape(shape)

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""
        check_slot(slot, self._slots)
        check_dtype(rows, self._dtype)
        layers, heads = len(self._buffers), self._contract.num_kv_heads
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(layers, 2, heads, -1)
        for layer in range(layers):
            for part in range(2):
                for head in range(heads):
                    self._device.upload(self._address(layer, part, slot, head, first), data[layer, part, head])
        # The bytes must live until they are copied.
        self._device.synchronize()

    def compact(self, cache_length: int, path: Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move a slot's positions `cache_length + path[k]` to `cache_length + k`, in every buffer at once."""
        check_slot(slot, self._slots)
        if self._kernel is None:
            raise GenerationError("this engine takes no trees: build with --tree-mask and compile again")
        indices = check_path(path)
        grid, args = launch_arguments(
            self._table + 8 * 2 * self._contract.num_layers * slot,
            self._path,
            num_caches=2 * self._contract.num_layers,
            num_heads=self._contract.num_kv_heads,
            capacity=self._contract.capacity,
            position_bytes=self._position_bytes,
            cache_length=cache_length,
            path_length=len(indices),
        )
        self._path_host.view(np.int64)[: len(indices)] = indices
        self._device.upload(self._path, self._path_host)
        self._device.launch(self._kernel, grid, args)
        # The next call writes the path's buffer.
        self._device.synchronize()

    @property
    def _slot_bytes(self) -> int:
        """Of one buffer."""
        return self._contract.num_kv_heads * self._contract.capacity * self._position_bytes

    def _address(self, layer: int, part: int, slot: int, head: int, position: int) -> int:
        place = head * self._contract.capacity + position
        return self._buffers[layer][part] + slot * self._slot_bytes + place * self._position_bytes
