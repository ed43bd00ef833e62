"""One loaded verifier on our own kernels: everything allocated at load, one recorded graph per kind of pass.

A pass takes the positions of several sequences, without padding: it copies one block of inputs to the device, launches
a recorded graph, and copies the tokens back.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engines.batches import check_batch
from engines.cache_rows import CacheRows, Float32
from engines.contract import Contract, longest_for
from engines.cuda.buffers import plan_buffers, scratch_bytes
from engines.cuda.graphs import Graphs
from engines.cuda.inputs import Inputs, input_bytes
from engines.cuda.launches import Addresses, Limits, launches
from engines.cuda.pass_sizes import PassSizes, splits_of_batch, stepped, stepped_tiles
from engines.cuda.program import Attention, Program, Receive, Tell
from engines.gpu.cache import DeviceCache
from engines.gpu.device import Device, LoadedKernel, OutOfMemoryError
from engines.gpu.limits import length_advice
from engines.session import Positions, SessionMemory, positions_of, rows_of
from plugins.gpu.variants import HEAD_TILE_TOKENS, num_splits, tile_tokens
from quasar.errors import EngineError, FaultError

Int64 = NDArray[np.int64]

# Weights go to the device in pieces of so many bytes.
_PIECE = 64 << 20
# Rows that the LM head takes at a time where sequences share passes: as many as the widest pass whose latency is
# measured. More are taken in parts, each of which reads the head's weights again.
_SHARED_HEAD_ROWS = 128


class CudaSession:
    """Runs a program. `run`, `run_batch` and `top_tokens` return views of buffers that the next call overwrites."""

    def __init__(
        self,
        program: Program,
        weights: Path,
        kernels: Mapping[str, LoadedKernel],
        device: Device,
        contract: Contract,
        *,
        slots: int = 1,
        max_positions: int | None = None,
        graphs: bool = True,
        overlap: bool = False,
        weights_of: "CudaSession | None" = None,
    ) -> None:
        """Allocate everything, and bring the weights to the device.

        Args:
            weights: the file that the program's tensors lie in.
            kernels: those of `program.variants()` by name, loaded on the device.
            device: is closed with the session, unless `weights_of` is given.
            slots: sequences that the cache holds, and that share passes.
            max_positions: that one pass takes, of all sequences together; None for those of a chunk of a prompt.
            graphs: record each kind of verify pass once, and replay it (CUDA graphs).
            overlap: let a kernel start before the one before it has ended; for compute capability 9.0 and above.
            weights_of: a session on the same device, which holds this file's weights already and outlives this one.

        Raises:
            EngineError: a kernel is missing, a size makes no session, or the GPU has no room.
        """
        self.contract = contract
        self.num_layers = contract.num_layers
        least = max(contract.max_width, contract.prefill_chunk)
        self.max_positions = self.max_logits_rows = least if max_positions is None else max_positions
        self.num_slots = self.max_sequences = slots
        self.takes_trees = True
        self._program, self._kernels, self._device = program, kernels, device
        self._overlap = overlap
        self._graphs = Graphs(device, self._enqueue, enabled=graphs)
        # Of the latest pass: wanted rows, how many there were with those that fill it up, and tokens fed.
        self._num_rows = self._rows = self._fed = 0
        self._weights_of = weights_of
        # What a session that uses this one's weights has in the device's context.
        self._before_closing: list[Callable[[], None]] = []
        self.weights_address = 0
        self._weight_bytes = weights.stat().st_size if weights_of is None else 0
        self._buffer_bytes = 0
        try:
            self._check(slots, least)
            self.max_sequences = min(slots, self.max_positions)
            self._free_bytes = device.free_bytes
            self._cache = DeviceCache(device, contract, program.cache_type, kernels.get("kv_compact"), slots=slots)
            self._allocate(weights)
            if weights_of is not None:
                weights_of.before_closing(self._graphs.close)
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
        for close in self._before_closing:
            close()
        self._graphs.close()
        if self._weights_of is None:
            self._device.close()

    def before_closing(self, call: Callable[[], None]) -> None:
        """Let `close` begin with this."""
        self._before_closing.append(call)

    def run(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None = None,
    ) -> Int64:
        """Feed T tokens after `cache_length` committed positions of slot 0; `parents` (engines.tree) makes them a tree.

        Returns the target's token after each of the last `num_logits_rows` of them: int64 [M].
        """
        return self.run_batch([positions_of(token_ids, cache_length, num_logits_rows, parents)])

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
        if out is None:
            out = np.empty((num_logits_rows, self.contract.vocab_size), np.float32)
        self._run([positions_of(token_ids, cache_length, num_logits_rows, parents)], out)
        return out[:num_logits_rows]

    def run_batch(self, batch: Sequence[Positions], *, logits: Float32 | None = None) -> Int64:
        """Feed positions of several sequences, each in a slot of its own, in one pass.

        Returns the target's token after each wanted position, sequence after sequence: int64 [M]. Raises
        `GenerationError` for a batch that does not fit.

        Args:
            logits: float32 [M or more, V]: the logits of those positions are written there as well.
        """
        self._run(batch, logits)
        tokens = self._tokens[: self._num_rows]
        if self._num_rows and tokens.min() < 0:
            raise FaultError("the pass returned no token: its logits are not numbers")
        return tokens

    def run_received(self, batch: Sequence[Positions], received: Sequence[Float32]) -> None:
        """The same for a program that receives float32 [positions, columns] in each step that receives some.

        Logits that are not numbers are no fault here: their `top_tokens` are -1.

        Raises:
            GenerationError: the batch does not fit.
            ValueError: arrays of other shapes.
        """
        self._run(batch, None, received)

    @property
    def top_tokens(self) -> Int64 | None:
        """The likeliest tokens after each position that the latest call was asked for: int64 [M, k], or None."""
        k = self._program.top_k
        if not k:
            return None
        return self._tokens[self._rows :][: self._num_rows * k].reshape(self._num_rows, k)

    @property
    def hidden_states(self) -> tuple[Float32, ...] | None:
        """What a draft head reads of every position that the latest call fed: float32 [R, H], or None without a head.

        One array: hidden states of several layers were fused in the pass.
        """
        return self.told(selected=False) or None

    @property
    def likelihoods(self) -> Float32:
        """The log-probabilities of `top_tokens`: float32 [M, k]; of a draft head's program."""
        k = self._program.top_k
        return self._likelihoods[: self._num_rows * k].reshape(self._num_rows, k)

    def told(self, *, selected: bool) -> tuple[Float32, ...]:
        """What the program tells: float32 [R, columns] of all positions that the latest call fed, or of those wanted.

        Views of buffers that the next call overwrites.
        """
        rows = self._num_rows if selected else self._fed
        return tuple(
            array.view(np.float32)[: rows * step.columns].reshape(rows, step.columns)
            for step, array in self._told
            if step.selected == selected
        )

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None, *, slot: int = 0) -> CacheRows:
        """A copy of positions, of some layers or of all, in the cache's own type: [layers, 2, G, positions, D]."""
        return self._cache.read_rows(first, end, layers, slot=slot)

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""
        self._cache.write_rows(first, rows, slot=slot)

    def compact(self, cache_length: int, path: Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move an accepted tree path, ascending indices of the last call, to the front of the new positions."""
        self._cache.compact(cache_length, path, slot=slot)

    def memory(self) -> SessionMemory:
        """What the session takes on the GPU."""
        return SessionMemory(weights=self._weight_bytes, cache=self._cache.nbytes, buffers=self._buffer_bytes)

    def _check(self, slots: int, least: int) -> None:
        """Raise `EngineError` for what makes no session."""
        missing = [variant.name for variant in self._program.variants() if variant.name not in self._kernels]
        if missing:
            raise EngineError(f"kernels are missing: {', '.join(missing)}: compile the engine again")
        if slots < 1:
            raise EngineError(f"slots is {slots}; 1 or more were expected")
        if self.max_positions < least:
            raise EngineError(f"max_positions is {self.max_positions}; {least} or more were expected")

    def _run(self, batch: Sequence[Positions], out: Float32 | None, received: Sequence[Float32] = ()) -> None:
        """Make one pass: tokens and top tokens to the host, logits of the wanted rows into `out`."""
        check_batch(
            batch,
            self.contract,
            num_slots=self.num_slots,
            most_sequences=self.max_sequences,
            max_positions=self.max_positions,
        )
        num_rows, fed = sum(one.num_logits for one in batch), sum(len(one.tokens) for one in batch)
        for (step, target), given in zip(self._received.items(), received, strict=True):
            if given.shape != (fed, step.columns):
                raise ValueError(f"an array {list(given.shape)} came; [{fed}, {step.columns}] was expected")
            target.view(np.float32)[: given.size] = given.reshape(-1)
        wanted = None if out is None else rows_of(out, num_rows, self.contract.vocab_size)
        logits = wanted if num_rows else None
        sizes = self._sizes_of(batch, num_rows, logits=logits is not None)
        if self._is_recorded(sizes):
            self._graphs.run(sizes)
            if logits is not None:
                self._device.download(logits.reshape(-1).view(np.uint8), self._at.logits)
        else:
            self._enqueue(sizes, logits)
        self._device.synchronize()
        self._num_rows, self._rows, self._fed = num_rows, sizes.rows, fed

    def _sizes_of(self, batch: Sequence[Positions], num_rows: int, *, logits: bool) -> PassSizes:
        """Fill the inputs; what the pass is launched with."""
        fed, reach = sum(len(one.tokens) for one in batch), self.contract.max_width
        # One sequence's verify pass has exact sizes, and so has every pass of a session that has one slot. Where
        # sequences share passes, prompts are recorded, too: what a wide pass takes does not depend on who is in it.
        steps = self._graphs.enabled and self.num_slots > 1 and (len(batch) > 1 or fed > reach)
        tokens = stepped(fed) if steps else fed
        rows = min(stepped(num_rows), tokens) if steps else num_rows
        tiles = self._inputs.fill(batch, tokens, rows)
        return PassSizes(
            tokens=tokens,
            rows=rows,
            splits=splits_of_batch(batch, reach, self._limits.most_splits),
            tiles=stepped_tiles(tiles, tokens, reach) if steps else tiles,
            logits=logits,
        )

    def _is_recorded(self, sizes: PassSizes) -> bool:
        """Whether a graph is made of such a pass: logits that come in parts are copied between its launches."""
        in_parts = sizes.logits and sizes.rows > self._limits.head_rows
        return not in_parts and (self.num_slots > 1 or sizes.tokens <= self.contract.max_width)

    def _enqueue(self, sizes: PassSizes, logits: Float32 | None = None) -> None:
        """Put a pass on the stream; `logits` float32 [M, V] are copied part by part, where they are given."""
        self._inputs.upload(sizes.tokens)
        for step, array in self._received.items():
            self._device.upload(self._at.buffers[step.output], array[: 4 * sizes.tokens * step.columns])
        # The launch after a copy must not overlap with it: a copy tells nobody that it is about to end.
        after_copy = True
        for launch in launches(self._program, sizes, self._at, self._limits):
            overlap = self._overlap and not after_copy
            self._device.launch(self._kernels[launch.kernel], launch.grid, launch.arguments, overlap=overlap)
            after_copy = logits is not None and launch.logits is not None
            if logits is not None and launch.logits is not None:
                # Without the rows that fill the pass up.
                part = logits[slice(*launch.logits)]
                self._device.download(part.reshape(-1).view(np.uint8), self._at.logits)
        if sizes.rows:
            count = sizes.rows * (1 + self._program.top_k)
            self._device.download(self._tokens[:count].view(np.uint8), self._at.next_tokens)
            if self._likelihoods.size:
                count = sizes.rows * self._program.top_k
                self._device.download(self._likelihoods[:count].view(np.uint8), self._at.likelihoods)
        for told, array in self._told:
            rows = sizes.rows if told.selected else sizes.tokens
            if rows:
                self._device.download(array[: 4 * rows * told.columns], self._at.buffers[told.input])

    def _allocate(self, weights: Path) -> None:
        contract, program, device = self.contract, self._program, self._device
        reach, is_shared = contract.max_width, self.num_slots > 1
        tokens = stepped(self.max_positions) if is_shared else self.max_positions
        self._limits = Limits(
            capacity=contract.capacity,
            most_splits=max(1, num_splits(contract.capacity, reach)),
            multiprocessors=device.multiprocessors,
            tokens=tokens,
            head_rows=max(HEAD_TILE_TOKENS[-1], min(_SHARED_HEAD_ROWS, tokens)) if is_shared else HEAD_TILE_TOKENS[-1],
        )
        placed, blocks = plan_buffers(program)
        sizes = scratch_bytes(program, self._limits)
        sizes |= {str(block): 4 * tokens * columns for block, columns in enumerate(blocks)}
        # All of it, before any of it is allocated: where there is no room, the advice needs the whole.
        self._buffer_bytes = input_bytes(tokens, reach) + self._cache.table_bytes + sum(sizes.values())
        shared = self._weights_of
        at_weights = device.allocate(self._weight_bytes) if shared is None else shared.weights_address
        self.weights_address = at_weights
        self._cache.allocate()
        attention = (step for step in program.steps if isinstance(step, Attention))
        tile = min(tile_tokens(step.heads // step.kv_heads, step.head_size) for step in attention)
        self._inputs = Inputs(device, contract, tokens, tile)
        at = {name: device.allocate(size) for name, size in sizes.items()}
        self._tokens = device.pinned(sizes["next_tokens"]).view(np.int64)
        likelihoods = sizes["likelihoods"]
        self._likelihoods = device.pinned(likelihoods).view(np.float32) if likelihoods else np.empty(0, np.float32)
        steps = program.steps
        self._received = {step: device.pinned(4 * tokens * step.columns) for step in steps if isinstance(step, Receive)}
        self._told = [(step, device.pinned(4 * tokens * step.columns)) for step in steps if isinstance(step, Tell)]
        self._at = Addresses(
            tensors={name: at_weights + tensor.offset for name, tensor in program.tensors.items()},
            buffers={name: at[str(block)] for name, block in placed.items()},
            inputs=self._inputs.addresses,
            caches=self._cache.pairs,
            **{name: address for name, address in at.items() if not name.isdigit()},
        )
        if shared is None:
            _upload(device, at_weights, np.memmap(weights, np.uint8, "r"))
        device.synchronize()

    def _memory_advice(self) -> str:
        """How much weights and cache need, and which max_sequences or --max-length would fit."""
        if self._weights_of is not None:
            return (
                f"the GPU has no room for the draft head: its cache takes {self._cache.nbytes} bytes, its buffers "
                f"{self._buffer_bytes}, and {self._free_bytes} were free beside the engine: load with a smaller "
                "max_sequences, or without it, options=CudaOptions(draft_head=False)"
            )
        contract, per_position, slots = self.contract, self._cache.bytes_per_position, self.num_slots
        room = self._free_bytes - self._weight_bytes - self._buffer_bytes
        length, fewer = longest_for(room // (per_position * slots)), room // (per_position * contract.capacity)
        each = f" of each of {slots} sequences" if slots > 1 else ""
        return (
            f"the GPU has no room: the weights take {self._weight_bytes} bytes, the KV cache {self._cache.nbytes} for "
            f"{contract.max_length} tokens{each}, and {self._free_bytes} bytes were free: "
            f"{length_advice(length, contract, slots=max(0, fewer) if slots > 1 else 0)}"
        )


def _upload(device: Device, address: int, data: NDArray[np.uint8]) -> None:
    """Copy a mapped file piece by piece."""
    for start in range(0, len(data), _PIECE):
        device.upload(address + start, data[start : start + _PIECE])
        # The bytes must live until they are copied, and no longer.
        device.synchronize()
