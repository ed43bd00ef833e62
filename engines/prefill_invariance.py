"""The probe for prefix reuse: a row of a prefill chunk has the bits of the same row fed by decoding.

Where it holds, what decoding left in the cache may stand in for a prefill of the same tokens.
"""

from typing import Protocol

import numpy as np

from engines.cache_rows import Float32
from engines.contract import Contract
from engines.row_invariance import Int64, RowInvariance

_SEED = 20262


class PrefillSession(Protocol):
    """What the probe needs of a session."""

    contract: Contract
    num_layers: int
    max_logits_rows: int

    def run_logits(self, token_ids: Int64, cache_length: int, num_logits_rows: int, /) -> Float32:
        """Logits, or hidden states where the graph has no head, of the last rows: float32 [rows, columns]."""

    def read_rows(self, first: int, end: int, layers: list[int] | None = None) -> Float32:
        """A copy of cache rows: float32 [layers, 2, G, rows, D]."""

    def write_rows(self, first: int, rows: Float32) -> None:
        """Overwrite cache rows of all layers."""


def prefill_is_exact(session: PrefillSession, found: RowInvariance, *, rows: int | None = None) -> bool:
    """Compare chunks, into an empty cache and behind a full chunk, with their rows decoded one by one, bit for bit.

    Args:
        found: the widths at which chains are exact. No prefill is where decoding is not, or has boundaries.
        rows: how many rows of each chunk are decoded; None for all.
    """
    if found.chain is None or found.boundaries:
        return False
    contract, base = session.contract, found.chain
    chunk = min(contract.prefill_chunk, contract.max_length // 2, session.max_logits_rows)
    count = chunk if rows is None else min(rows, chunk)
    random = np.random.default_rng(_SEED)
    exact = True
    for length in (0, chunk):
        tokens = random.integers(0, contract.vocab_size, chunk)
        junk = random.integers(0, contract.vocab_size, chunk + base)
        if length:
            session.write_rows(0, random.standard_normal(session.read_rows(0, length).shape, np.float32))
        whole = session.run_logits(tokens, length, chunk).copy()
        written = session.read_rows(length, length + chunk)
        for row in range(count):
            fed = np.concatenate([tokens[row : row + 1], junk[row + 1 : row + base]])
            narrow = session.run_logits(fed, length + row, base)[0]
            exact = exact and narrow.tobytes() == whole[row].tobytes()
        decoded = session.read_rows(length, length + count)
        exact = exact and decoded.tobytes() == np.ascontiguousarray(written[..., :count, :]).tobytes()
    return exact
