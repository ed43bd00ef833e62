"""One loaded verifier on our own kernels: everything allocated at load, one recorded graph per kind of pass.

A round copies one block of inputs to the device, launches a recorded graph, and copies the tokens back.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engines.batches import only_sequence
from engines.cache_rows import CacheRows, Float32, check_slot
from engines.contract import Contract, longest_for
from engines.cuda.buffers import plan_buffers
from engines.cuda.inputs import Inputs, input_bytes
from engines.cuda.launches import Addresses, Limits, PassSizes, launches, sums_of
from engines.cuda.program import Attention, Head, Linear, Program
from engines.gpu.cache import DeviceCache
from engines.gpu.device import Device, LoadedKernel, OutOfMemoryError, RecordedWork
from engines.gpu.limits import check_pass, length_advice
from engines.session import Positions, SessionMemory, rows_of
from engines.tree import check_parents
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS, tiles_of
from plugins.gpu.variants import num_splits, power_of_2
from quasar.errors import EngineError

Int64 = NDArray[np.int64]

_log = logging.getLogger("quasar.engines")
# Weights go to the device in pieces of so many bytes.
_PIECE = 64 << 20


class CudaSession:
    """Runs a program. `run` and `top_tokens` return views of buffers that the next call overwrites."""

    def __init__(
        self,
        program: Program,
        weights: Path,
        kernels: Mapping[str, LoadedKernel],
        device: Device,
        contract: Contract,
        *,
        graphs: bool = True,
        overlap: bool = False,
    ) -> None:
        """Allocate everything, and bring the weights to the device.

        Args:
            weights: the file that the program's tensors lie in.
            kernels: those of `program.variants()` by name, loaded on the device.
            device: is closed with the session.
            graphs: record each kind of verify pass once, and replay it (CUDA graphs).
            overlap: let a kernel start before the one before it has ended; for compute capability 9.0 and above.

        Raises:
            EngineError: a kernel is missing, or the GPU has no room.
        """
        self.contract = contract
        self.num_layers = contract.num_layers
        self.max_logits_rows = contract.max_width
        self.num_slots = self.max_sequences = 1
        self.max_positions = contract.prefill_chunk
        self.takes_trees = True
        self._program, self._kernels, self._device, self._graphs = program, kernels, device, graphs
        self._overlap = overlap
        self._recorded: dict[PassSizes, RecordedWork] = {}
        self._seen: set[PassSizes] = set()
        self._num_rows = 0
        self._weight_bytes = weights.stat().st_size
        self._buffer_bytes = 0
        missing = [variant.name for variant in program.variants() if variant.name not in kernels]
        if missing:
            device.close()
            raise EngineError(f"kernels are missing: {', '.join(missing)}: compile the engine again")
        try:
            self._free_bytes = device.free_bytes
            self._cache = DeviceCache(device, contract, program.cache_type, kernels.get("kv_compact"))
            self._allocate(weights)
        except OutOfMemoryError as error:
            advice = self._memory_advice()
            self.close()
            raise EngineError(advice) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs and memory; a second call does nothing."""
        for work in self._recorded.values():
            work.close()
        self._recorded.clear()
        self._device.close()

    def run(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None = None,
    ) -> Int64:
        """Feed T tokens after `cache_length` committed positions; `parents` (engines.tree) makes them a tree.

        Returns the target's token after each of the last `num_logits_rows` of them: int64 [M].
        """
        self._run(token_ids, cache_length, num_logits_rows, parents, logits=False)
        return self._next_tokens(num_logits_rows)

    def run_logits(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None = None,
        *,
        out: Float32 | None = None,
    ) -> Float32:
        """As `run`, but returns logits float32 [M, V] of those positions: a new array, or the first rows of `out`."""
        shape = (num_logits_rows, self.contract.vocab_size)
        logits = rows_of(np.empty(shape, np.float32) if out is None else out, *shape)
        self._run(token_ids, cache_length, num_logits_rows, parents, logits=True)
        self._device.download(logits.reshape(-1).view(np.uint8), self._at.logits)
        self._device.synchronize()
        return logits

    def run_batch(self, batch: Sequence[Positions], *, logits: Float32 | None = None) -> Int64:
        """Feed the positions of one sequence, since passes of this back end take one.

        Returns the target's token after each wanted position: int64 [M]. `logits` float32 [M or more, V]: those of
        the same positions are written there as well.
        """
        one = only_sequence(batch)
        rows = None if logits is None else rows_of(logits, one.num_logits, self.contract.vocab_size)
        # A pass has one target at least, whether it is wanted or not.
        wanted = max(one.num_logits, 1)
        if rows is None or not len(rows):
            self.run(one.tokens, one.cache_length, wanted, one.parents)
        else:
            self.run_logits(one.tokens, one.cache_length, wanted, one.parents, out=rows)
        self._num_rows = one.num_logits
        return self._next_tokens(wanted)[: one.num_logits]

    @property
    def top_tokens(self) -> Int64 | None:
        """The likeliest tokens after each position that the latest call was asked for: int64 [M, k], or None."""
        k = self._program.top_k
        if not k:
            return None
        return self._tokens[self.max_logits_rows :][: self._num_rows * k].reshape(self._num_rows, k)

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None, *, slot: int = 0) -> CacheRows:
        """A copy of positions, of some layers or of all, in the cache's own type: [layers, 2, G, positions, D]."""
        check_slot(slot, 1)
        return self._cache.read_rows(first, end, layers)

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""
        check_slot(slot, 1)
        self._cache.write_rows(first, rows)

    def compact(self, cache_length: int, path: Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move an accepted tree path, ascending indices of the last call, to the front of the new positions."""
        check_slot(slot, 1)
        self._cache.compact(cache_length, path)

    def memory(self) -> SessionMemory:
        """What the session takes on the GPU."""
        return SessionMemory(
            weights=self._weight_bytes,
            cache=self._cache.bytes_per_position * self.contract.capacity,
            buffers=self._buffer_bytes,
        )

    def _next_tokens(self, count: int) -> Int64:
        tokens = self._tokens[:count]
        if tokens.min() < 0:
            raise EngineError("the pass returned no token: its logits are not numbers")
        return tokens

    def _run(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None,
        *,
        logits: bool,
    ) -> None:
        contract, width = self.contract, len(token_ids)
        check_pass(contract, width, num_logits_rows, cache_length)
        checked = None
        if parents is not None:
            checked = check_parents(parents, width, contract, takes_trees=self.takes_trees)
        self._inputs.fill(token_ids, cache_length, num_logits_rows, checked)
        splits = num_splits(cache_length + width - 1, self._program.reach)
        # One graph serves all lengths up to the next power of two: programs beyond a path's end do nothing.
        splits = min(power_of_2(splits), self._limits.most_splits) if splits else 0
        self._launch(PassSizes(tokens=width, rows=num_logits_rows, splits=splits, logits=logits))
        self._device.synchronize()
        self._num_rows = num_logits_rows

    def _launch(self, sizes: PassSizes) -> None:
        if not self._graphs or sizes.tokens > self.contract.max_width:
            self._enqueue(sizes)
            return
        if sizes not in self._seen:
            # The first launch of a kernel may load it, which must not be recorded.
            self._seen.add(sizes)
            self._enqueue(sizes)
            return
        if sizes not in self._recorded:
            self._device.begin_capture()
            try:
                self._enqueue(sizes)
                self._recorded[sizes] = self._device.end_capture()
            except EngineError as error:
                self._device.abandon_capture()
                self._graphs = False
                _log.warning("passes cannot be recorded as CUDA graphs (%s): they run without", error)
                self._enqueue(sizes)
                return
        self._recorded[sizes].launch()

    def _enqueue(self, sizes: PassSizes) -> None:
        self._inputs.upload()
        for index, launch in enumerate(launches(self._program, sizes, self._at, self._limits)):
            # The first one follows a copy, which tells nobody that it is about to end.
            overlap = self._overlap and index > 0
            self._device.launch(self._kernels[launch.kernel], launch.grid, launch.arguments, overlap=overlap)
        self._device.download(self._tokens.view(np.uint8), self._at.next_tokens)

    def _allocate(self, weights: Path) -> None:
        contract, program, device = self.contract, self._program, self._device
        tokens, reach = max(contract.prefill_chunk, contract.max_width), contract.max_width
        self._limits = Limits(
            capacity=contract.capacity,
            most_splits=max(1, num_splits(contract.capacity, reach)),
            multiprocessors=device.multiprocessors,
        )
        placed, blocks = plan_buffers(program)
        sizes = self._sizes(tokens) | {str(block): 4 * tokens * columns for block, columns in enumerate(blocks)}
        # All of it, before any of it is allocated: where there is no room, the advice needs the whole.
        self._buffer_bytes = input_bytes(tokens, reach) + self._cache.table_bytes + sum(sizes.values())
        at_weights = device.allocate(self._weight_bytes)
        self._cache.allocate()
        self._inputs = Inputs(device, tokens, reach)
        at = {name: device.allocate(size) for name, size in sizes.items()}
        # Next tokens, then the likeliest ones: they are copied back in one piece.
        self._tokens = device.pinned(sizes["next_tokens"]).view(np.int64)
        self._at = Addresses(
            tensors={name: at_weights + tensor.offset for name, tensor in program.tensors.items()},
            buffers={name: at[str(block)] for name, block in placed.items()},
            inputs=self._inputs.addresses,
            top_tokens=at["next_tokens"] + 8 * reach,
            caches=self._cache.pairs,
            **{name: address for name, address in at.items() if not name.isdigit()},
        )
        _upload(device, at_weights, np.memmap(weights, np.uint8, "r"))
        device.synchronize()

    def _sizes(self, tokens: int) -> dict[str, int]:
        """Bytes of what `Addresses` names beside tensors, buffers, inputs and caches, for passes of so many tokens."""
        contract, program, limits = self.contract, self._program, self._limits
        reach = contract.max_width
        attention = [step for step in program.steps if isinstance(step, Attention)]
        linears = [step for step in program.steps if isinstance(step, Linear)]
        head = next(step for step in program.steps if isinstance(step, Head))
        most_inputs = max(head.inputs, *(step.inputs for step in linears))
        queries = max(step.heads * step.head_size for step in attention)
        keys = 8 * reach * tiles_of(head.vocabulary, TILE_OUTPUTS) * program.likeliest
        return {
            "quantized": tokens * tiles_of(most_inputs, TILE_INPUTS) * TILE_INPUTS,
            "amax": 4 * tokens,
            "sums": 4 * max(sums_of(step, limits.multiprocessors) for step in linears),
            "arrived": 4 * max(tiles_of(step.outputs, TILE_OUTPUTS) for step in linears),
            "queries": 4 * tokens * queries,
            "partial": 4 * reach * limits.most_splits * queries,
            "partial_stats": 8 * reach * limits.most_splits * max(step.heads for step in attention),
            "keys": keys,
            "merged": keys,
            "logits": 4 * reach * contract.vocab_size,
            "next_tokens": 8 * reach * (1 + program.top_k),
        }

    def _memory_advice(self) -> str:
        """How much weights and cache need, and which --max-length would fit."""
        contract, per_position, free = self.contract, self._cache.bytes_per_position, self._free_bytes
        fixed = self._weight_bytes + self._buffer_bytes
        length = longest_for((free - fixed) // per_position)
        return (
            f"the GPU has no room: the weights take {self._weight_bytes} bytes, the KV cache "
            f"{per_position * contract.capacity} for {contract.max_length} tokens, and {free} bytes were free: "
            f"{length_advice(length, contract)}"
        )


def _upload(device: Device, address: int, data: NDArray[np.uint8]) -> None:
    """Copy a mapped file piece by piece."""
    for start in range(0, len(data), _PIECE):
        device.upload(address + start, data[start : start + _PIECE])
        # The bytes must live until they are copied, and no longer.
        device.synchronize()
