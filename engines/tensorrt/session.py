"""One loaded verifier on TensorRT: everything allocated at load, addresses set once, a few integers per round.

A round copies one small block of inputs to the device, runs the plan on one stream, and copies the tokens back.
Both profiles write to one KV cache; `past` and `present` are the same addresses.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engines import contract as names
from engines.batches import only_sequence
from engines.cache_rows import CacheRows, Float32, check_slot
from engines.contract import Contract
from engines.gpu.cache import DeviceCache
from engines.gpu.device import Device, LoadedKernel, OutOfMemoryError, RecordedWork
from engines.gpu.limits import check_pass, length_advice
from engines.session import Positions, SessionMemory, rows_of
from engines.tensorrt.bindings import check_bindings
from engines.tensorrt.staging import Staging, Tokens
from engines.tree import ancestor_mask, check_parents, depths
from quasar.errors import EngineError, FaultError

Int64 = NDArray[np.int64]

_log = logging.getLogger("quasar.engines")
VERIFY, PREFILL = 0, 1
# A graph holds a context of its own; widths beyond so many different shapes run without one.
_MAX_GRAPHS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPlan:
    """A deserialized plan. `engine` is a `tensorrt.ICudaEngine`, or what stands in for one.

    `context_argument`: what contexts are made with, so that they bring no scratch memory of their own.
    `last_error`: the library's last complaint. `before_close`: called while the engine is still there. `keep_alive`:
    what must not be freed before the engine.
    """

    engine: Any
    context_argument: Any
    plan_bytes: int
    last_error: Callable[[], str]
    before_close: Callable[[], None] = lambda: None
    keep_alive: tuple[Any, ...] = ()


@dataclass(slots=True)
class _Replay:
    """A context whose shapes never change again, and the work recorded from it once it has run."""

    context: Any
    work: RecordedWork | None = None


class TensorRtSession:
    """Runs a plan. `run` and `top_tokens` return views of buffers that the next call overwrites."""

    def __init__(
        self,
        plan: LoadedPlan,
        device: Device,
        contract: Contract,
        *,
        graphs: bool = True,
        kernel: LoadedKernel | None = None,
    ) -> None:
        """Allocate everything.

        Args:
            device: is closed with the session.
            graphs: record a verify call of each shape once, and replay it (CUDA graphs).
            kernel: kv_compact, loaded on the device; None where the contract has no trees.

        Raises:
            EngineError: the plan does not fit the contract, or the GPU has no room for plan and KV cache.
        """
        self.contract = contract
        self.num_layers = contract.num_layers
        self.max_logits_rows = contract.max_width
        self.num_slots = self.max_sequences = 1
        self.max_positions = contract.prefill_chunk
        self.takes_trees = contract.tree_mask
        self._plan, self._device, self._graphs = plan, device, graphs
        self._replays: dict[tuple[int, int], _Replay] = {}
        self._contexts: list[Any] = []
        self._num_rows = 0
        try:
            self._cache = DeviceCache(device, contract, check_bindings(plan.engine, contract).cache_type, kernel)
            self._allocate()
        except OutOfMemoryError as error:
            self.close()
            raise EngineError(self._memory_advice()) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs, contexts, the engine and its memory, in that order; a second call does nothing."""
        if self._contexts:
            self._plan.before_close()
        for replay in self._replays.values():
            if replay.work is not None:
                replay.work.close()
        self._replays.clear()
        self._contexts.clear()
        self._shared: list[Any] = []
        self._plan = replace(self._plan, engine=None, context_argument=None, keep_alive=(), before_close=lambda: None)
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
        self._run(token_ids, cache_length, num_logits_rows, parents)
        self._device.synchronize()
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
        self._run(token_ids, cache_length, num_logits_rows, parents)
        shape = (num_logits_rows, self.contract.vocab_size)
        logits = rows_of(np.empty(shape, np.float32) if out is None else out, *shape)
        self._device.download(logits.reshape(-1).view(np.uint8), self._logits)
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
        return self._tokens.top_tokens(self._num_rows)

    @property
    def hidden_states(self) -> None:
        """None: no draft head runs on TensorRT."""
        return None

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None, *, slot: int = 0) -> CacheRows:
        """A copy of positions, of some layers or of all, in the plan's own type: [layers, 2, G, positions, D]."""
        check_slot(slot, 1)
        return self._cache.read_rows(first, end, layers)

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""
        check_slot(slot, 1)
        self._cache.write_rows(first, rows)

    def compact(self, cache_length: int, path: Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move an accepted tree path, ascending indices of the last call, to the front of the new positions.

        One launch for all layers, after the pass on its stream.
        """
        check_slot(slot, 1)
        self._cache.compact(cache_length, path)

    def memory(self) -> SessionMemory:
        """What the session takes on the GPU."""
        contract = self.contract
        return SessionMemory(
            weights=self._plan.plan_bytes,
            cache=self._cache.bytes_per_position * contract.capacity,
            buffers=self._scratch_bytes + contract.max_width * (4 * contract.vocab_size + 8 * (1 + contract.top_k)),
        )

    def _next_tokens(self, count: int) -> Int64:
        tokens = self._tokens.next_tokens(count)
        if tokens.min() < 0:
            raise FaultError("the plan returned no token: its logits are not numbers")
        return tokens

    def _allocate(self) -> None:
        contract, device = self.contract, self._device
        self._free_bytes = device.free_bytes
        self._scratch_bytes = int(self._plan.engine.device_memory_size_v2)
        self._scratch = device.allocate(self._scratch_bytes)
        self._cache.allocate()
        self._staging = [
            Staging(device, tokens, contract.max_width, tree_mask=contract.tree_mask)
            for tokens in (contract.max_width, contract.prefill_chunk)
        ]
        self._tokens = Tokens(device, contract.max_width, contract.top_k)
        self._logits = device.allocate(4 * contract.max_width * contract.vocab_size)
        self._shared = [self._context(profile) for profile in (VERIFY, PREFILL)]
        device.synchronize()

    def _context(self, profile: int) -> Any:
        """A new execution context on the shared scratch memory, with every address set."""
        context = self._plan.engine.create_execution_context(self._plan.context_argument)
        if context is None:
            raise EngineError(f"TensorRT made no execution context: {self._plan.last_error()}")
        self._contexts.append(context)
        try:
            context.set_optimization_profile_async(profile, self._device.stream)
        except RuntimeError:  # of all these calls it alone raises
            raise EngineError(f"TensorRT refused the profile: {self._plan.last_error()}") from None
        context.set_device_memory(self._scratch, self._scratch_bytes)
        addresses = {
            **self._staging[profile].addresses,
            **self._cache.addresses,
            **self._tokens.addresses,
            names.LOGITS: self._logits,
        }
        for name, address in addresses.items():
            self._check(context.set_tensor_address(name, address), f"the address of {name}")
        for name, shape in self._fixed_shapes().items():
            self._check(context.set_input_shape(name, shape), f"the shape of {name}")
        return context

    def _fixed_shapes(self) -> dict[str, tuple[int, ...]]:
        contract = self.contract
        cache = (contract.max_batch, contract.num_kv_heads, contract.capacity, contract.head_size)
        fixed = {name: cache for layer in range(contract.num_layers) for name in names.past_names(layer)}
        return {**fixed, names.CACHE_LENGTHS: (contract.max_batch,)}

    def _run(
        self,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None,
    ) -> None:
        contract, width = self.contract, len(token_ids)
        check_pass(contract, width, num_logits_rows, cache_length)
        checked = None if parents is None else check_parents(parents, width, contract)
        profile = VERIFY if width <= contract.max_width else PREFILL
        self._staging[profile].fill(
            token_ids,
            cache_length,
            num_logits_rows,
            offsets=None if checked is None else depths(checked),
            mask=None if checked is None else ancestor_mask(checked),
        )
        if profile == VERIFY and self._graphs:
            self._replay(width, num_logits_rows)
        else:
            self._enqueue(self._shared[profile], profile, width, num_logits_rows, set_shapes=True)
        self._num_rows = num_logits_rows

    def _replay(self, width: int, num_logits_rows: int) -> None:
        """First call of a shape: run it. Second: record it. From then on: launch what was recorded.

        A graph stays valid only while its context is left alone, so each has a context of its own.
        """
        key = (width, num_logits_rows)
        replay = self._replays.get(key)
        if replay is None:
            if len(self._replays) >= _MAX_GRAPHS:
                self._enqueue(self._shared[VERIFY], VERIFY, width, num_logits_rows, set_shapes=True)
                return
            replay = self._replays[key] = _Replay(self._context(VERIFY))
            # The run that follows a change of shape does work that must not be recorded.
            self._enqueue(replay.context, VERIFY, width, num_logits_rows, set_shapes=True)
            return
        if replay.work is None and self._graphs:
            replay.work = self._record(replay.context, width, num_logits_rows)
        if replay.work is None:
            self._enqueue(replay.context, VERIFY, width, num_logits_rows, set_shapes=False)
        else:
            replay.work.launch()

    def _record(self, context: Any, width: int, num_logits_rows: int) -> RecordedWork | None:
        try:
            # TensorRT-RTX alone knows beforehand.
            if not getattr(context, "is_stream_capturable", lambda stream: True)(self._device.stream):
                raise EngineError("TensorRT says that its work cannot be captured")
            self._device.begin_capture()
            self._enqueue(context, VERIFY, width, num_logits_rows, set_shapes=False)
            return self._device.end_capture()
        except EngineError as error:
            self._device.abandon_capture()
            self._graphs = False
            _log.warning("this plan cannot be recorded as a CUDA graph (%s): it runs without", error)
            return None
        except BaseException:
            # An interrupt: a stream that goes on recording would run nothing any more.
            self._device.abandon_capture()
            raise

    def _enqueue(self, context: Any, profile: int, width: int, num_logits_rows: int, *, set_shapes: bool) -> None:
        if set_shapes:
            for name, shape in self._staging[profile].shapes(width, num_logits_rows).items():
                self._check(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
        self._staging[profile].upload()
        self._check(context.execute_async_v3(self._device.stream), "the pass")
        self._tokens.download(num_logits_rows)

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"TensorRT refused {what}: {self._plan.last_error()}")

    def _memory_advice(self) -> str:
        """How much plan and cache need, and which --max-length would fit."""
        contract, per_position, free = self.contract, self._cache.bytes_per_position, self._free_bytes
        fixed = self._scratch_bytes + 4 * contract.max_width * contract.vocab_size
        length = (free - fixed) // per_position - (contract.capacity - contract.max_length)
        return (
            f"the GPU has no room: the plan takes {self._plan.plan_bytes} bytes, its scratch memory "
            f"{self._scratch_bytes}, the KV cache {per_position * contract.capacity} for {contract.max_length} tokens, "
            f"and {free} bytes were free after the plan: {length_advice(length, contract)}"
        )
