"""A session without a model, for testing drafters and loops: the next token is a function of the context."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract

Int64 = NDArray[np.int64]


class TableSession:
    """Answers as a verifier would whose target's choice after a context is `next_token(context)`.

    It keeps the tokens of its cache and reads nothing but committed rows and the rows of the call, so a loop that
    commits or truncates wrongly gets other answers. `calls` holds (cache length, fed tokens) of every call.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence[int]], int],
        *,
        vocab_size: int = 100,
        max_length: int = 512,
        prefill_chunk: int = 256,
    ) -> None:
        self.contract = Contract(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            vocab_size=vocab_size,
            max_length=max_length,
            capacity=max_length + 64,
            prefill_chunk=prefill_chunk,
        )
        self._next_token = next_token
        self._cached = np.full(self.contract.capacity, -1, np.int64)
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def run(self, token_ids: Int64, cache_length: int, num_logits_rows: int, /) -> Int64:
        """Feed tokens behind the committed rows; the target's token after each of the last rows: int64 [rows]."""
        self.calls.append((cache_length, tuple(int(token) for token in token_ids)))
        end = cache_length + len(token_ids)
        self._cached[cache_length:end] = token_ids
        rows = range(end - num_logits_rows, end)
        return np.array([self._next_token(self._cached[: row + 1].tolist()) for row in rows], np.int64)
