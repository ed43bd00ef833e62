"""A draft head on ONNX Runtime's native operators: its two graphs, and a KV cache of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines import contract as names
from engines import draft_head as head_names
from engines.batches import check_batch
from engines.cache_rows import Float32, new_cache
from engines.contract import Contract
from engines.draft_head import DraftHeadFiles, HeadTargets
from engines.onnxruntime.binding import Binding
from engines.onnxruntime.inputs import Buffer, RaggedInputs
from engines.onnxruntime.session import MOST_SEQUENCES, external_bytes
from engines.onnxruntime.session_options import open_graph, session_options
from engines.session import Positions, SessionMemory


class OnnxRuntimeDraftHead:
    """Runs a head's graphs; what `run` returns are views of buffers that the next call overwrites."""

    def __init__(
        self,
        directory: Path,
        files: DraftHeadFiles,
        verifier: Contract,
        *,
        library: Path,
        threads: int = 0,
        slots: int = 1,
        max_positions: int | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            directory: the engine directory, where the external data lies.
            verifier: the verifier's contract.
            library: the native operators.
            threads: 0 lets ONNX Runtime take one per physical core; the shared pool's where there is one.
            slots: sequences that the cache holds.
            max_positions: that one pass takes, of all sequences together; None for those of a chunk of a prompt.
        """
        import onnxruntime as ort

        self.hidden_size = files.hidden_size
        self.contract = contract = files.contract(verifier)
        self._weight_bytes = 0
        self._head = self._open(directory, files.graph, library, threads)
        self._fuse = self._open(directory, files.fuse, library, threads)
        self.num_slots = slots
        self.max_sequences = min(slots, MOST_SEQUENCES)
        self.max_positions = most = (
            max(contract.max_width, contract.prefill_chunk) if max_positions is None else max_positions
        )
        shape = (slots, contract.num_kv_heads, contract.capacity, contract.head_size)
        self._cache = (new_cache(shape, np.float32), new_cache(shape, np.float32))
        self._inputs = RaggedInputs(ort, contract, most, self.max_sequences)
        self._top = Buffer(ort, (1, most, files.top_k), axis=1)
        self._likelihoods = Buffer(ort, (1, most, files.top_k), axis=1, dtype=np.float32)
        self._following = Buffer(ort, (1, most, files.hidden_size), axis=1, dtype=np.float32)
        self._hidden = Buffer(ort, (1, most, files.hidden_size), axis=1, dtype=np.float32)
        self._binding = Binding(self._head)
        for past, present, part in zip(names.past_names(0), names.present_names(0), self._cache, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(part)
            self._binding.input(past, value)
            self._binding.output(present, value)

    def fuse(self, features: Sequence[Float32]) -> Float32:
        """The target's hidden states, float32 [R, hidden] for each layer → float32 [R, H], a new array."""
        feeds = {head_names.feature_name(number): states[None] for number, states in enumerate(features)}
        fused: Float32 = self._fuse.run([head_names.FUSED], feeds)[0][0]
        return fused

    def run(self, batch: Sequence[Positions], hidden_states: Float32) -> HeadTargets:
        """Feed positions of several sequences with the hidden states float32 [R, H] that they read.

        Raises:
            GenerationError: the batch does not fit.
        """
        check_batch(
            batch,
            self.contract,
            num_slots=self.num_slots,
            most_sequences=self.max_sequences,
            max_positions=self.max_positions,
        )
        count, binding = sum(len(one.tokens) for one in batch), self._binding
        wanted = sum(one.num_logits for one in batch)
        self._hidden.array[0, :count] = hidden_states
        self._inputs.bind(binding, batch)
        binding.input(head_names.HIDDEN_STATES, self._hidden.value(count))
        binding.output(names.TOP_TOKENS, self._top.value(wanted))
        binding.output(head_names.LOG_PROBABILITIES, self._likelihoods.value(wanted))
        binding.output(head_names.NEXT_HIDDEN_STATES, self._following.value(wanted))
        binding.run()
        return HeadTargets(
            tokens=self._top.array[0, :wanted],
            log_probabilities=self._likelihoods.array[0, :wanted],
            hidden_states=self._following.array[0, :wanted],
        )

    def copy_rows(self, source: int, target: int, first: int, end: int) -> None:
        """As `DraftHeadSession`."""
        for part in self._cache:
            part[target, :, first:end] = part[source, :, first:end]

    def memory(self) -> SessionMemory:
        """Bytes of weights, the embedding that it shares with the verifier among them, and of the whole cache."""
        buffers = (self._top, self._likelihoods, self._following, self._hidden)
        return SessionMemory(
            weights=self._weight_bytes,
            cache=sum(part.nbytes for part in self._cache),
            buffers=sum(buffer.array.nbytes for buffer in buffers),
        )

    def close(self) -> None:
        """Free the memory."""
        del self._binding, self._head, self._fuse, self._cache

    def _open(self, directory: Path, graph: str, library: Path, threads: int) -> Any:
        options = session_options(threads=threads, exact_integers=True, library=library)
        # Threads that wait for the next step on their cores make the verifier's passes after it twice as slow.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session, content = open_graph(directory, directory / graph, options)
        self._weight_bytes += external_bytes(content)
        return session
