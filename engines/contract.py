"""The verifier's contract: tensor names, shapes and dtypes that every back end and the runtime agree on.

| tensor | dtype [shape] | ragged form | meaning |
|---|---|---|---|
| input_ids | int64 [B, T] | [1, R] | pending token and drafts, or a chunk of the prompt |
| position_ids | int64 [B, T] | [1, R] | rotary positions |
| cache_lengths | int64 [B] | [B] | committed positions; token t of a sequence is written at cache_lengths + t |
| tree_mask | bool [B, T, T] | [ΣT²] or [0] | new token r sees new token c (ancestors and itself) |
| sequence_starts | | int64 [B + 1] | the first of each sequence's tokens, ascending from 0; then R |
| cache_slots | | int64 [B] | distinct: which of the caches is a sequence's own |
| logits_rows | int64 [M] | [M] | the fed positions that reach the final norm and the LM head |
| past_key_values.{i}.key / .value | float32 [B, G, S, D] | [slots, G, S, D] | the caches, preallocated and bound once |
| present.{i}.key / .value | the same buffer as past | as past | updated in place |
| next_tokens | int64 [B, M] | [1, M] | the target's token after each of those positions |
| top_tokens | int64 [B, M, k] | [1, M, k] | its k likeliest ones, likeliest first, ties by lower id |
| logits | float32 [B, M, V] | [1, M, V] | only when asked for |

The canonical form is that of the portable graph and of its lowerings to stock kernels and TensorRT, which run one
sequence. Graphs of native kernels, and CUDA's programs, have the ragged form: the R positions of B sequences in one
row, one sequence after the other. There `tree_mask` is each sequence's own [T, T] after the other's, or no value: every
sequence is a chain.
`tree_mask` of a canonical graph, and `top_tokens`, are only where the contract has them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from engines.fields import check_fields
from quasar.errors import DamagedEngineError

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
CACHE_LENGTHS = "cache_lengths"
TREE_MASK = "tree_mask"
SEQUENCE_STARTS = "sequence_starts"
CACHE_SLOTS = "cache_slots"
LOGITS_ROWS = "logits_rows"
NEXT_TOKENS = "next_tokens"
TOP_TOKENS = "top_tokens"
LOGITS = "logits"
PAST_PREFIX = "past_key_values."
PRESENT_PREFIX = "present."
# In place of the logits, in the cut-down graph that probes run on: hidden states and attention outputs.
HIDDEN = "hidden"

# The widest verify call: pending token and drafts.
MAX_WIDTH = 32
PREFILL_CHUNK = 256
# The k of `top_tokens` in what is built now.
TOP_K = 8
# Bytes of a value of the KV cache, by type.
KV_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int8-tiers": 1}
# Values are integers, under scales in the native graph; in tiers, drafts of the engine's own read half of their bits.
INT8_CACHE, TIERED_CACHE = "int8", "int8-tiers"
INTEGER_CACHES = (INT8_CACHE, TIERED_CACHE)
# Above head size 128, ONNX Runtime's attention changes its path at 64 positions: see `spare_positions`.
_WIDE_HEAD = 128
_WIDE_HEAD_TOTAL = 65


def past_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache inputs, key and value."""
    return f"{PAST_PREFIX}{layer}.key", f"{PAST_PREFIX}{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of a layer's cache outputs, key and value."""
    return f"{PRESENT_PREFIX}{layer}.key", f"{PRESENT_PREFIX}{layer}.value"


def layer_output(layer: int) -> str:
    """Value [B, T, hidden] of every graph: the residual stream after a layer."""
    return f"layers.{layer}.output"


def has_boundaries(head_size: int) -> bool:
    """Whether stock attention may sum in another order from some number of positions on: above head size 128."""
    return head_size > _WIDE_HEAD


def spare_positions(head_size: int, total_rows: int) -> int:
    """Zero positions fed after `total_rows` (cached and new) to attention, so that bits do not depend on the width.

    One of them avoids the kernel for a single position; above head size 128 they fill every pass up to 65 in total.
    """
    return 1 if head_size <= _WIDE_HEAD else max(1, _WIDE_HEAD_TOTAL - total_rows)


def capacity_for(max_length: int) -> int:
    """Positions S of the cache: the longest context, the widest verify call after it, spare ones; a multiple of 64."""
    positions = max(max_length + MAX_WIDTH + 1, _WIDE_HEAD_TOTAL + 1)
    return -(-positions // 64) * 64


def longest_for(positions: int) -> int:
    """The longest context whose cache has so many positions or fewer; 0 or less where there is none."""
    return positions // 64 * 64 - MAX_WIDTH - 1


def top_k_for(vocab_size: int) -> int:
    """How many tokens `top_tokens` of a new engine names after each position: `TOP_K`, or the whole vocabulary."""
    return min(TOP_K, vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The sizes by name: L layers, G kv heads, D head size, V vocabulary, S capacity.

    `kv_dtype` is that of native kernels' cache; stock kernels have float32 alone, TensorRT its compute type. `top_k` is
    the k of `top_tokens`; 0 in engines of earlier versions, which have no such output.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_length: int
    capacity: int
    max_width: int = MAX_WIDTH
    prefill_chunk: int = PREFILL_CHUNK
    max_batch: int = 1
    tree_mask: bool = False
    kv_dtype: str = "float32"
    top_k: int = 0

    def to_json(self) -> dict[str, Any]:
        """The manifest's `contract`; a `top_k` of 0 is left out, so that earlier engines keep their hash."""
        return {name: value for name, value in asdict(self).items() if name != "top_k" or value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Contract":
        """Read the manifest's `contract`; raises `DamagedEngineError` naming a field that does not fit."""
        expected = {field.name: field.type for field in fields(cls) if field.name != "top_k" or "top_k" in value}
        contract = cls(**check_fields("contract", value, expected))
        # Without a `top_k` of 0, which is no size but says that there is no such output.
        sizes = [size for size in contract.to_json().values() if isinstance(size, int) and not isinstance(size, bool)]
        if contract.kv_dtype not in KV_DTYPES:
            raise DamagedEngineError(f"manifest.json: contract.kv_dtype is {contract.kv_dtype!r}")
        fits = contract.capacity >= capacity_for(contract.max_length) and contract.top_k <= contract.vocab_size
        if min(sizes) < 1 or not fits:
            raise DamagedEngineError("manifest.json: contract has sizes that do not fit each other")
        return contract

    def prompt_chunks(self, length: int, first: int = 0) -> Iterator[slice]:
        """How the tokens from `first` to `length` of a prompt are fed: the slice of each pass.

        A prompt is always cut in the same places, so that its bits are always the same: `first` is a multiple of the
        chunk where they must be.
        """
        for start in range(first, length, self.prefill_chunk):
            yield slice(start, min(start + self.prefill_chunk, length))

    @property
    def cache_bytes(self) -> int:
        """Memory of one slot of the KV cache, keys and values of every layer, in `kv_dtype`."""
        return self.cache_values * KV_DTYPES[self.kv_dtype]

    @property
    def cache_values(self) -> int:
        """Values of one slot of the KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.capacity * self.head_size
