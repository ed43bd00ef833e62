"""A draft head in an engine directory: its graphs' tensors, what the manifest says of it, and what a session offers.

| tensor | dtype [shape], ragged form | meaning |
|---|---|---|
| input_ids, position_ids, cache_lengths, tree_mask, sequence_starts, cache_slots, logits_rows | as the verifier's | |
| hidden_states | float32 [1, R, H] | `fused` of the target's, or the head's own of the position before |
| past_key_values.0.key / .value, present.0.… | as the verifier's | the head's own cache, of one layer |
| top_tokens | int64 [1, M, k] | the likeliest tokens after those positions, the verifier's ids |
| log_probabilities | float32 [1, M, k] | theirs, among the tokens that the head drafts |
| next_hidden_states | float32 [1, M, H] | what a position that follows reads |

Position i is fed token i + 1 of the sequence with the hidden states after token i, and tells of token i + 2. The
second graph makes `fused` float32 [1, R, H] of `hidden_states.{n}` float32 [1, R, hidden], one for each of the target's
layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import Float32
from engines.contract import Contract
from engines.fields import check_fields
from engines.session import Positions, SessionMemory
from quasar.errors import DamagedEngineError

Int64 = NDArray[np.int64]

FOLDER = "draft_head"
# Positions that a step of a tree may feed: four nodes, each with a path of twelve.
WIDEST_STEP = 48
HIDDEN_STATES = "hidden_states"
FUSED = "fused"
NEXT_HIDDEN_STATES = "next_hidden_states"
LOG_PROBABILITIES = "log_probabilities"
# Value [B, M, H] of the canonical graph: the residual stream at the positions that `logits_rows` names.
OUTPUT_ROWS = "output_rows"
# The target's final norm, where the head reads what is after it.
TARGET_NORM = "target_norm"


def feature_name(number: int) -> str:
    """The input of the second graph that takes what enters one of the target's layers."""
    return f"{HIDDEN_STATES}.{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeadFiles:
    """The manifest's `draft_head`.

    `graph`, `fuse`, `weights`: paths in the engine directory, for native kernels. `feature_layers`: the target's hidden
    states that enter these are read. `source`: the name of the head's folder; `sha256`: of its weights.
    """

    kind: str
    graph: str
    fuse: str
    weights: str
    precision: str
    hidden_size: int
    num_kv_heads: int
    head_size: int
    draft_vocab_size: int
    top_k: int
    parameters: int
    feature_layers: tuple[int, ...]
    source: str
    sha256: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every file."""
        return self.graph, self.fuse, self.weights

    def contract(self, verifier: Contract) -> Contract:
        """The sizes of the head's passes: the verifier's, with one layer and its own heads.

        Its trees may be wider: a step feeds nodes with their paths, whatever the verifier is fed at the end.
        """
        return Contract(
            num_layers=1,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            vocab_size=verifier.vocab_size,
            max_length=verifier.max_length,
            capacity=verifier.capacity,
            max_width=max(verifier.max_width, WIDEST_STEP),
            prefill_chunk=verifier.prefill_chunk,
            tree_mask=True,
            top_k=self.top_k,
        )

    def check(self, verifier: Contract) -> None:
        """Raise `DamagedEngineError` for what cannot be a head of this verifier."""
        layers = self.feature_layers
        if not layers or min(layers) < 1 or max(layers) > verifier.num_layers:
            raise DamagedEngineError(f"manifest.json: draft_head.feature_layers is {list(layers)}")
        sizes = (self.hidden_size, self.num_kv_heads, self.head_size, self.draft_vocab_size, self.top_k)
        if min(sizes) < 1 or self.draft_vocab_size > verifier.vocab_size or self.top_k > self.draft_vocab_size:
            raise DamagedEngineError("manifest.json: draft_head has sizes that do not fit each other")

    def to_json(self) -> dict[str, Any]:
        """The manifest's `draft_head`."""
        return {**asdict(self), "feature_layers": list(self.feature_layers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DraftHeadFiles":
        """Read it; raises `DamagedEngineError` naming what does not fit."""
        expected = {field.name: field.type for field in fields(cls)} | {"feature_layers": list}
        checked = check_fields("draft_head", value, expected)
        layers = checked.pop("feature_layers")
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise DamagedEngineError(f"manifest.json: draft_head.feature_layers is {layers!r}; integers were expected")
        return cls(**checked, feature_layers=tuple(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTargets:
    """What a head says after each wanted position. Arrays are views that the next call overwrites.

    `tokens` int64 [M, k], likeliest first; `log_probabilities` float32 [M, k]; `hidden_states` float32 [M, H].
    """

    tokens: Int64
    log_probabilities: Float32
    hidden_states: Float32


class DraftHeadSession(Protocol):
    """A loaded draft head with a KV cache of its own, of as many slots as the verifier's.

    `hidden_size`: H, values of a hidden state that its positions read.
    """

    contract: Contract
    hidden_size: int
    num_slots: int
    max_sequences: int
    max_positions: int

    def fuse(self, features: Sequence[Float32]) -> Float32:
        """What the verifier's session tells (`Session.hidden_states`) → float32 [R, H], a new array."""

    def run(self, batch: Sequence[Positions], hidden_states: Float32) -> HeadTargets:
        """Feed positions of several sequences with the hidden states float32 [R, H] that they read."""

    def copy_rows(self, source: int, target: int, first: int, end: int) -> None:
        """Copy rows `first` to `end` of one slot's cache to another's."""

    def memory(self) -> SessionMemory:
        """What it takes; the cache at its full length."""

    def close(self) -> None:
        """Free the memory."""
