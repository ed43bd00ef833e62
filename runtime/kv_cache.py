"""One sequence's positions in the KV cache: which tokens they hold, and how many of them a later prompt may reuse.

The positions themselves are the session's memory, which `runtime.scheduler` gives to one sequence at a time.
"""

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from quasar.errors import ContextLimitError

Int64 = NDArray[np.int64]

# Beginnings of prompts serve again in multiples of so many positions, where a position's bits do not depend on the pass
# that wrote it.
PREFIX_STEP = 16


class KVCache:
    """Committed positions of one sequence: position i is of `tokens[i]`. Those after them may be overwritten.

    `slot`: where they lie in the session's cache while the sequence is resident (`runtime.slots`).
    """

    def __init__(self, contract: Contract) -> None:
        self.slot = 0
        self.max_length = contract.max_length
        self._chunk = contract.prefill_chunk
        self._tokens = np.empty(contract.max_length, np.int64)
        self.length = 0
        # Leading positions that whole prefill chunks wrote: a prefill of the same tokens repeats these very calls.
        self._prefilled = 0

    @property
    def tokens(self) -> Int64:
        """Tokens of the committed positions: a view, int64 [length]."""
        return self._tokens[: self.length]

    @property
    def room(self) -> int:
        """Positions that can still be committed."""
        return self.max_length - self.length

    def commit(self, tokens: Int64, *, prefill: bool = False) -> None:
        """Keep the next positions that the last pass wrote, of these tokens; `prefill`: they were a chunk of a prompt.

        Raises `ContextLimitError` if they do not fit.
        """
        count = len(tokens)
        if count > self.room:
            raise ContextLimitError(f"{count} tokens do not fit a KV cache with room for {self.room}")
        if prefill and count == self._chunk and self._prefilled == self.length:
            self._prefilled += count
        self._tokens[self.length : self.length + count] = tokens
        self.length += count

    def truncate(self, length: int) -> None:
        """Drop every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ContextLimitError(f"the KV cache holds {self.length} tokens and cannot be cut to {length}")
        self.length = length
        self._prefilled = min(self._prefilled, length // self._chunk * self._chunk)

    def reusable(self, prompt: Int64, *, decoded_exact: bool) -> int:
        """How many positions serve as a prefill of `prompt`, bit for bit, without its last token.

        Args:
            decoded_exact: whether decoded positions have the bits of prefilled ones (`RowInvariance.prefill`). Else
                whole chunks serve that a prefill wrote.
        """
        common = self.common_prefix(prompt)
        if decoded_exact:
            return common // PREFIX_STEP * PREFIX_STEP
        return min(common, self._prefilled) // self._chunk * self._chunk

    def common_prefix(self, prompt: Int64) -> int:
        """How many positions are of the prompt's first tokens, its last one apart."""
        return common_length(self.tokens, prompt[:-1])

    def copy(self) -> "KVCache":
        """The same tokens, for a copy of the same positions."""
        other = object.__new__(KVCache)
        other.slot = 0
        other.max_length, other._chunk = self.max_length, self._chunk
        other.length, other._prefilled = self.length, self._prefilled
        other._tokens = self._tokens.copy()
        return other


def common_length(one: Int64, other: Int64) -> int:
    """How many tokens two sequences, int64 [n] and [m], begin with in common."""
    longest = min(len(one), len(other))
    different = np.flatnonzero(one[:longest] != other[:longest])
    return int(different[0]) if len(different) else longest
