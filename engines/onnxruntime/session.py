"""One loaded verifier on ONNX Runtime: buffers allocated once, past and present bound to the same memory once."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import contract as names
from engines.cache_rows import Float32, HostCacheArrays, HostCaches
from engines.contract import Contract
from engines.onnxruntime.session_options import session_options
from engines.session import SessionMemory, rows_of
from engines.tree import ancestor_mask, check_parents, depths
from quasar.errors import EngineError, GenerationError

Int64 = NDArray[np.int64]

# ONNX Runtime's name of a type → numpy's, which has no bfloat16.
_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16}
_BFLOAT16 = 16
# A StringStringEntryProto: field 1 "length", field 2 digits, after their own length.
_LENGTH_ENTRY = re.compile(rb"\n\x06length\x12(.)", re.DOTALL)
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


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
    ) -> None:
        """Load the graph.

        Args:
            directory: where the external data lies; nothing outside it is read.
            num_layers: layers of this graph, if it is a cut-down copy.
            threads: 0 lets ONNX Runtime take one per physical core; the shared pool's where there is one.
            exact_integers: choose integer kernels that cannot saturate on CPUs without VNNI.
            library: the native operators that the graph needs (`engines.onnxruntime.kernels`).
            profile_prefix: write ONNX Runtime's profile there (`end_profiling`).
            caches: another session's, to work on in place of its own.
        """
        import onnxruntime as ort

        options = session_options(threads=threads, exact_integers=exact_integers, library=library)
        options.add_session_config_entry(_DATA_FOLDER, str(directory.resolve()))
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        try:
            content = graph.read_bytes()
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors share no public base
            raise EngineError(f"{graph} cannot be loaded by ONNX Runtime {ort.__version__}: {error}") from None
        self.contract = contract
        self._weight_bytes = external_bytes(content)
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        # A cut-down graph has hidden states in place of logits.
        self._rows_output = names.LOGITS if names.LOGITS in outputs else names.HIDDEN
        self._columns = int(outputs[self._rows_output][-1])
        shape = (1, contract.num_kv_heads, contract.capacity, contract.head_size)
        self.num_layers = contract.num_layers if num_layers is None else num_layers
        self._ort = ort
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        cache_type = _CACHE_TYPES[inputs[names.past_names(0)[0]]]
        if caches is None:
            caches = [(np.zeros(shape, cache_type), np.zeros(shape, cache_type)) for _ in range(self.num_layers)]
        if any(part.shape != shape or part.dtype != cache_type for pair in caches for part in pair):
            raise EngineError(f"the cache to be shared is not {np.dtype(cache_type)} {list(shape)} in every layer")
        self.caches = caches
        self._cache_values = [tuple(_shared_value(ort, part) for part in pair) for pair in self.caches]
        self.max_logits_rows = widest = max(contract.max_width, contract.prefill_chunk)
        self._ids = _Buffer(ort, (1, widest))
        self._positions = _Buffer(ort, (1, widest))
        self._rows = _Buffer(ort, (widest,))
        self._lengths = np.zeros(1, np.int64)
        self._lengths_value = ort.OrtValue.ortvalue_from_numpy(self._lengths)
        self._tokens = _Buffer(ort, (1, widest))
        # A cut-down graph has none either.
        has_top = contract.top_k > 0 and names.TOP_TOKENS in outputs
        self._top_tokens = _Buffer(ort, (1, widest, contract.top_k), axis=1) if has_top else None
        self._num_rows = 0
        # Native graphs take a tree whatever the portable graph takes.
        self.takes_trees = names.TREE_MASK in inputs
        self._native = library is not None
        self._tree_masks = _TreeMasks(ort, widest) if self.takes_trees else None
        self._count = np.arange(widest, dtype=np.int64)
        self._binding = self._bind_fixed()
        self._logits_binding: Any = None

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
        self._feed(self._binding, token_ids, cache_length, num_logits_rows, parents)
        self._binding.bind_ortvalue_output(names.NEXT_TOKENS, self._tokens.value(num_logits_rows))
        self._execute(self._binding, num_logits_rows)
        return self._tokens.array[0, :num_logits_rows]

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
        if self._logits_binding is None:
            self._logits_binding = self._bind_fixed()
        self._feed(self._logits_binding, token_ids, cache_length, num_logits_rows, parents)
        if out is None:
            out = np.empty((num_logits_rows, self._columns), np.float32)
        rows = rows_of(out, num_logits_rows, self._columns)
        self._logits_binding.bind_ortvalue_output(self._rows_output, self._ort.OrtValue.ortvalue_from_numpy(rows[None]))
        self._execute(self._logits_binding, num_logits_rows)
        return rows

    @property
    def top_tokens(self) -> Int64 | None:
        """The likeliest tokens after each position that the latest call was asked for: int64 [M, k], or None."""
        return None if self._top_tokens is None else self._top_tokens.array[0, : self._num_rows]

    def memory(self) -> SessionMemory:
        """What the session takes."""
        buffers = [self._ids, self._positions, self._rows, self._tokens]
        buffers += [] if self._top_tokens is None else [self._top_tokens]
        return SessionMemory(
            weights=self._weight_bytes,
            cache=sum(part.nbytes for pair in self.caches for part in pair),
            buffers=sum(buffer.array.nbytes for buffer in buffers),
        )

    def close(self) -> None:
        """Let go of the caches' memory and of ONNX Runtime's session."""
        del self._binding, self._logits_binding, self._cache_values, self._session
        self.caches = []

    def end_profiling(self) -> Path:
        """Stop profiling; the profile's file."""
        return Path(self._session.end_profiling())

    def _bind_fixed(self) -> Any:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(names.CACHE_LENGTHS, self._lengths_value)
        for layer, values in enumerate(self._cache_values):
            for past, present, value in zip(names.past_names(layer), names.present_names(layer), values, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
        return binding

    def _feed(
        self,
        binding: Any,
        token_ids: Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Sequence[int] | Int64 | None,
    ) -> None:
        width = len(token_ids)
        checked = None
        if parents is not None:
            checked = check_parents(parents, width, self.contract, takes_trees=self.takes_trees)
        if checked is not None and cache_length == 0 and not self._native:
            # Into an empty cache GroupQueryAttention rotates tokens by their order and ignores position_ids.
            raise GenerationError("a tree was fed into an empty cache: feed at least one token of the prompt first")
        self._ids.array[0, :width] = token_ids
        offsets = self._count[:width] if checked is None else depths(checked)
        np.add(offsets, cache_length, out=self._positions.array[0, :width])
        if self._tree_masks is not None:
            binding.bind_ortvalue_input(names.TREE_MASK, self._tree_masks.value(width, checked))
        np.add(self._count[:num_logits_rows], width - num_logits_rows, out=self._rows.array[:num_logits_rows])
        self._lengths[0] = cache_length
        binding.bind_ortvalue_input(names.INPUT_IDS, self._ids.value(width))
        binding.bind_ortvalue_input(names.POSITION_IDS, self._positions.value(width))
        binding.bind_ortvalue_input(names.LOGITS_ROWS, self._rows.value(num_logits_rows))

    def _execute(self, binding: Any, num_logits_rows: int) -> None:
        if self._top_tokens is not None:
            binding.bind_ortvalue_output(names.TOP_TOKENS, self._top_tokens.value(num_logits_rows))
        self._session.run_with_iobinding(binding)
        self._num_rows = num_logits_rows


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


class _TreeMasks:
    """The contract's `tree_mask` per width; a chain's is made once."""

    def __init__(self, ort: Any, widest: int) -> None:
        self._ort = ort
        self._lower = np.tril(np.ones((widest, widest), np.bool_))
        self._chains: dict[int, Any] = {}

    def value(self, width: int, parents: Int64 | None) -> Any:
        if parents is not None:
            return self._ort.OrtValue.ortvalue_from_numpy(ancestor_mask(parents)[None])
        if width not in self._chains:
            chain = np.ascontiguousarray(self._lower[None, :width, :width])
            self._chains[width] = self._ort.OrtValue.ortvalue_from_numpy(chain)
        return self._chains[width]


class _Buffer:
    """An int64 buffer and, per length of one axis, the OrtValue of its first elements (no copy).

    `axis`: which; the last, if not given. Those before it have one element.
    """

    def __init__(self, ort: Any, shape: tuple[int, ...], axis: int | None = None) -> None:
        self.array = np.zeros(shape, np.int64)
        self._before = (slice(None),) * (len(shape) - 1 if axis is None else axis)
        self._ort = ort
        self._values: dict[int, Any] = {}

    def value(self, length: int) -> Any:
        if length not in self._values:
            self._values[length] = self._ort.OrtValue.ortvalue_from_numpy(self.array[(*self._before, slice(length))])
        return self._values[length]
