"""What every back end's session offers; the loop, the probes and the reports know no more than this."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import CacheRows, Float32, from_float32
from engines.contract import Contract
from quasar.numerics import QMAX

Int64 = NDArray[np.int64]
# Of a cache that is filled at random: more would take seconds of a build.
_DRAWN_POSITIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMemory:
    """Bytes that a loaded engine uses.

    `weights`: tensors that the graph reads; on ONNX Runtime they are mapped files, which processes share. `cache`: the
    KV cache at its full length; on a CPU, pages that were never written take no memory. `buffers`: inputs and outputs.
    """

    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """The positions of one sequence that a pass feeds: `tokens` int64 [T], in `slot` from `cache_length` on.

    `parents` int64 [T] (engines.tree) makes them a tree. The target's token is wanted after each of the last
    `num_logits`; 0 where it is wanted after none.
    """

    tokens: Int64
    cache_length: int
    num_logits: int
    slot: int = 0
    parents: Int64 | None = None


def positions_of(
    token_ids: Sequence[int] | Int64, cache_length: int, num_logits: int, parents: Sequence[int] | Int64 | None = None
) -> Positions:
    """Those that `Session.run` is asked for, in slot 0."""
    return Positions(
        tokens=np.asarray(token_ids, np.int64),
        cache_length=cache_length,
        num_logits=num_logits,
        parents=None if parents is None else np.asarray(parents, np.int64),
    )


def rows_of(out: Float32, count: int, columns: int) -> Float32:
    """The first `count` rows of a buffer for logits; raises `ValueError` unless a session can write them in place."""
    if out.dtype != np.float32 or out.shape[1:] != (columns,) or len(out) < count or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} {out.shape}; contiguous float32 [{count} or more, {columns}] was expected"
        )
    return out[:count]


class Session(Protocol):
    """One loaded verifier with its KV cache.

    `max_logits_rows`: so many positions of one call can be asked for. `takes_trees`: `parents` may come.
    `num_slots`: sequences that the cache holds, each in a slot of its own. `max_sequences`: of one pass; 1 where
    sequences cannot share one. `max_positions`: fed in one pass, all sequences together.

    Arrays that `run`, `run_batch` and `top_tokens` return are views that the next call overwrites.
    """

    contract: Contract
    num_layers: int
    max_logits_rows: int
    takes_trees: bool
    num_slots: int
    max_sequences: int
    max_positions: int

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

    def run_batch(self, batch: Sequence[Positions], *, logits: Float32 | None = None) -> Int64:
        """Feed positions of several sequences, each in a slot of its own, in one pass where the session can.

        A position's bits are those that it has alone. Where `max_sequences` is 1, a session with several slots runs
        one pass for each sequence.

        Args:
            logits: float32 [M or more, V], contiguous: the logits of the wanted positions are written there as well.

        Returns:
            The target's token after each wanted position, sequence after sequence: int64 [M].

        Raises:
            GenerationError: the batch does not fit the session.
            ValueError: `logits` cannot take them.
        """

    @property
    def top_tokens(self) -> Int64 | None:
        """The target's likeliest tokens after each position that the latest call was asked for.

        int64 [M, contract.top_k], likeliest first, ties by lower id; the first column is what `run` returned. No
        rows before the first call; None where the engine has no such output (`contract.top_k` 0).
        """

    @property
    def hidden_states(self) -> tuple[Float32, ...] | None:
        """The target's hidden states at every position that the latest call fed, sequence after sequence.

        Float32 [R, hidden] for each layer whose input was asked for when the session was made, or one array [R, H] that
        the pass has fused of them for its draft head; None without such.
        """

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None, *, slot: int = 0) -> CacheRows:
        """A copy of positions, of some layers or of all, in the cache's own type: [layers, 2, G, positions, D]."""

    def write_rows(self, first: int, rows: CacheRows, *, slot: int = 0) -> None:
        """Overwrite the positions from `first` on, of all layers; raises `ValueError` for another type."""

    def compact(self, cache_length: int, path: Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move the new positions of an accepted tree path, ascending indices of the last call, to the front."""

    def memory(self) -> SessionMemory:
        """What the session takes."""

    def close(self) -> None:
        """Free the session's memory."""


def fill_randomly(session: Session, random: np.random.Generator, first: int, count: int, *, slot: int = 0) -> None:
    """Overwrite `count` cache positions of a slot from `first` on: normally distributed, or integers of every size.

    After some hundreds of positions they come again.
    """
    like = session.read_rows(first, first + 1)
    shape = (*like.shape[:-2], min(count, _DRAWN_POSITIONS), like.shape[-1])
    if like.dtype == np.int8:
        drawn = random.integers(-QMAX, QMAX + 1, shape, np.int8)
    else:
        drawn = from_float32(random.standard_normal(shape, np.float32), like.dtype)
    for start in range(0, count, _DRAWN_POSITIONS):
        session.write_rows(first + start, drawn[..., : count - start, :], slot=slot)
