"""One loaded verifier on ONNX Runtime: buffers allocated once, past and present bound to the same memory once.

A native graph takes the positions of several sequences in one pass. A stock one, or one that an earlier version built,
runs a pass for each, on the part of the caches that is the sequence's slot.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import contract as names
from engines.batches import check_batch
from engines.cache_rows import Float32, HostCacheArrays, HostCaches, new_cache
from engines.contract import Contract
from engines.onnxruntime.binding import Binding
from engines.onnxruntime.hidden_states import HiddenStates, with_hidden_states
from engines.onnxruntime.inputs import Buffer, CanonicalInputs, Inputs, RaggedInputs
from engines.onnxruntime.session_options import open_graph, session_options
from engines.session import Positions, SessionMemory, positions_of, rows_of
from quasar.errors import EngineError

Int64 = NDArray[np.int64]

# ONNX Runtime's name of a type → numpy's, which has no bfloat16.
_CACHE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
    "tensor(int8)": np.int8,
}
_BFLOAT16 = 16
# A StringStringEntryProto: field 1 "length", field 2 digits, after their own length.
_LENGTH_ENTRY = re.compile(rb"\n\x06length\x12(.)", re.DOTALL)
# Sequences of one pass, where there are so many slots.
MOST_SEQUENCES = 256


class OnnxRuntimeSession(HostCaches):
    """Runs a lowered verifier graph whose weights lie in `directory`.

    `run` and `top_tokens` return views of buffers that the next call overwrites.
    """

    def __init__(
        self,
        directory: Path,
        graph: Path,
        contract: Contract,
        *,
        num_layers: int | None = None,
        threads: int = 0,
        exact_integers: bool = False,
        library: Path | None = None,
        profile_prefix: Path | None = None,
        caches: HostCacheArrays | None = None,
        slots: int = 1,
        max_positions: int | None = None,
        hidden_states: Sequence[int] = (),
    ) -> None:
        """Load the graph.

        Args:
            directory: where the external data lies; nothing outside it is read.
            num_layers: layers of this graph, if it is a cut-down copy.
            threads: 0 lets ONNX Runtime take one per physical core; the shared pool's where there is one.
            exact_integers: choose integer kernels that cannot saturate on CPUs without VNNI.
            library: the native operators that the graph needs (`engines.onnxruntime.kernels`).
            profile_prefix: write ONNX Runtime's profile there (`end_profiling`).
            caches: another session's, to work on in place of its own; they say how many slots there are.
            slots: sequences that the cache holds.
            max_positions: that one pass takes, of all sequences together; None for those of a chunk of a prompt.
            hidden_states: layers; passes tell what enters them (`Session.hidden_states`).
        """
        import onnxruntime as ort

        options = session_options(threads=threads, exact_integers=exact_integers, library=library)
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        self._session, content = open_graph(
            directory, graph, options, adapt=lambda model: with_hidden_states(model, hidden_states)
        )
        self.contract = contract
        self._weight_bytes = external_bytes(content)
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        # A cut-down graph has hidden states in place of logits.
        self._rows_output = names.LOGITS if names.LOGITS in outputs else names.HIDDEN
        self._columns = int(outputs[self._rows_output][-1])
        self.num_layers = contract.num_layers if num_layers is None else num_layers
        self._ort = ort
        inputs = {value.name: value for value in self._session.get_inputs()}
        past = inputs[names.past_names(0)[0]]
        cache_type = _CACHE_TYPES[past.type]
        # Of one slot: kv heads, positions, values; or two tiers of half the values for each kv head.
        self._slot_shape = int(past.shape[1]), contract.capacity, int(past.shape[3])
        self.caches = self._new_caches(slots, cache_type) if caches is None else caches
        self.num_slots = len(self.caches[0][0])
        if any(part.shape != self._shape(self.num_slots) or part.dtype != cache_type for part in self._parts()):
            expected = f"{np.dtype(cache_type)} {list(self._shape(self.num_slots))}"
            raise EngineError(f"the cache to be shared is not {expected} in every layer")
        least = max(contract.max_width, contract.prefill_chunk)
        self.max_positions = most = least if max_positions is None else max_positions
        if most < least:
            raise EngineError(f"max_positions is {most}; {least} or more were expected")
        self.max_logits_rows = most
        self._inputs: Inputs
        self._is_ragged = names.SEQUENCE_STARTS in inputs
        if self._is_ragged:
            self.max_sequences = min(self.num_slots, MOST_SEQUENCES)
            self._inputs = RaggedInputs(ort, contract, most, self.max_sequences)
        else:
            self.max_sequences = 1
            self._inputs = CanonicalInputs(
                ort, contract, most, has_mask=names.TREE_MASK in inputs, rotates_by_order=library is None
            )
        # Stock attention is fed a position more, whose place in the cache it overwrites.
        self._spare = 1 if library is None else 0
        # Native graphs take a tree whatever the portable graph takes.
        self.takes_trees = self._inputs.takes_trees
        # A cut-down graph has neither.
        self._has_tokens = names.NEXT_TOKENS in outputs
        has_top = contract.top_k > 0 and names.TOP_TOKENS in outputs
        self._tokens = Buffer(ort, (1, most))
        self._top = Buffer(ort, (1, most, contract.top_k), axis=1) if has_top else None
        self._top_tokens = None if self._top is None else self._top.array[0, :0]
        self._hidden: HiddenStates | None = None
        self._hidden_views: tuple[Float32, ...] | None = None
        if hidden_states:
            self._hidden = HiddenStates(ort, hidden_states, most)
        # By slot, and whether logits are wanted.
        self._bindings: dict[tuple[int, bool], Binding] = {}

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
        """As `run`, but returns the logits float32 [M, V] of those positions (a cut-down graph: hidden states).

        A new array, or the first rows of `out`.
        """
        if out is None:
            out = np.empty((num_logits_rows, self._columns), np.float32)
        self.run_batch([positions_of(token_ids, cache_length, num_logits_rows, parents)], logits=out)
        return out[:num_logits_rows]

    def run_batch(self, batch: Sequence[Positions], *, logits: Float32 | None = None) -> Int64:
        """Feed positions of several sequences: in one pass where the graph takes them, else in a pass for each.

        Returns the target's token after each wanted position, sequence after sequence: int64 [M]; a cut-down graph
        has none, and -1 is in their place. Raises `GenerationError` for a batch that does not fit.

        Args:
            logits: float32 [M or more, V]: the logits of those positions are written there as well.
        """
        check_batch(
            batch,
            self.contract,
            num_slots=self.num_slots,
            most_sequences=self.max_sequences if self._is_ragged else self.num_slots,
            max_positions=self.max_positions,
            spare=self._spare,
        )
        num_logits = sum(one.num_logits for one in batch)
        rows = None if logits is None else rows_of(logits, num_logits, self._columns)
        if self._is_ragged or len(batch) == 1:
            self._run(batch, num_logits, rows)
            self._top_tokens = None if self._top is None else self._top.array[0, :num_logits]
            return self._tokens.array[0, :num_logits]
        tokens, tops, hidden = np.empty(num_logits, np.int64), [], []
        first = 0
        for one in batch:
            own = slice(first, first + one.num_logits)
            self._run([one], one.num_logits, None if rows is None else rows[own])
            tokens[own] = self._tokens.array[0, : one.num_logits]
            if self._top is not None:
                tops.append(self._top.array[0, : one.num_logits].copy())
            if self._hidden is not None:
                hidden.append([view.copy() for view in self._hidden_views or ()])
            first = own.stop
        self._top_tokens = np.concatenate(tops) if tops else None
        if hidden:
            self._hidden_views = tuple(np.concatenate(parts) for parts in zip(*hidden, strict=True))
        return tokens

    @property
    def top_tokens(self) -> Int64 | None:
        """The likeliest tokens after each position that the latest call was asked for: int64 [M, k], or None."""
        return self._top_tokens

    @property
    def hidden_states(self) -> tuple[Float32, ...] | None:
        """What entered the layers that were asked for, at every position of the latest call: float32 [R, hidden].

        None without such, and before the first call.
        """
        return self._hidden_views

    def memory(self) -> SessionMemory:
        """What the session takes."""
        outputs = [buffer.array.nbytes for buffer in (self._tokens, self._top) if buffer is not None]
        outputs.append(0 if self._hidden is None else self._hidden.nbytes)
        return SessionMemory(
            weights=self._weight_bytes,
            cache=sum(part.nbytes for part in self._parts()),
            buffers=self._inputs.nbytes + sum(outputs),
        )

    def close(self) -> None:
        """Let go of the caches' memory and of ONNX Runtime's session."""
        self._bindings.clear()
        del self._session
        self.caches = []

    def end_profiling(self) -> Path:
        """Stop profiling; the profile's file."""
        return Path(self._session.end_profiling())

    def _shape(self, slots: int) -> tuple[int, ...]:
        return slots, *self._slot_shape

    def _new_caches(self, slots: int, dtype: Any) -> HostCacheArrays:
        """Zeros: pages that nobody writes take no memory."""
        if slots < 1:
            raise EngineError(f"slots is {slots}; 1 or more were expected")
        shape = self._shape(slots)
        return [(new_cache(shape, dtype), new_cache(shape, dtype)) for _ in range(self.num_layers)]

    def _parts(self) -> list[NDArray[Any]]:
        return [part for pair in self.caches for part in pair]

    def _binding(self, slot: int, *, logits: bool) -> Binding:
        """What a pass binds, with the caches bound already: all slots, or that one where the graph has no slots."""
        if (slot, logits) not in self._bindings:
            binding = Binding(self._session)
            for layer, pair in enumerate(self.caches):
                for past, present, part in zip(names.past_names(layer), names.present_names(layer), pair, strict=True):
                    value = _shared_value(self._ort, part if self._is_ragged else part[slot : slot + 1])
                    binding.input(past, value)
                    binding.output(present, value)
            self._bindings[slot, logits] = binding
        return self._bindings[slot, logits]

    def _run(self, batch: Sequence[Positions], num_logits: int, rows: Float32 | None) -> None:
        """Make one pass: tokens and top tokens to the front of their buffers, logits into `rows`."""
        if num_logits == 0:
            # Not every kernel takes a head without positions; what comes of one is left where it is.
            batch, num_logits, rows = [replace(batch[0], num_logits=1), *batch[1:]], 1, None
        binding = self._binding(0 if self._is_ragged else batch[0].slot, logits=rows is not None)
        self._inputs.bind(binding, batch)
        if self._has_tokens:
            binding.output(names.NEXT_TOKENS, self._tokens.value(num_logits))
        else:
            self._tokens.array[0, :num_logits] = -1
        if self._top is not None:
            binding.output(names.TOP_TOKENS, self._top.value(num_logits))
        if self._hidden is not None:
            self._hidden.bind(binding, sum(len(one.tokens) for one in batch))
        if rows is not None:
            binding.output(self._rows_output, self._ort.OrtValue.ortvalue_from_numpy(rows[None]))
        binding.run()
        if self._hidden is not None:
            self._hidden_views = self._hidden.take(binding, sum(len(one.tokens) for one in batch))


def external_bytes(graph: bytes) -> int:
    """Bytes of the tensors that a serialized ONNX graph keeps in other files.

    Read from the entries `length` of their external data, since the runtime does without the onnx package.
    """
    lengths = (graph[entry.end() : entry.end() + entry[1][0]] for entry in _LENGTH_ENTRY.finditer(graph))
    return sum(int(digits) for digits in lengths if digits.isdigit())


def _shared_value(ort: Any, array: NDArray[Any]) -> Any:
    """An OrtValue over a cache's own memory."""
    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
