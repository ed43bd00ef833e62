"""The interface behind which every drafter stands."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Proposed tokens int64 [K].

    `parents` int64 [K] says which draft token each one follows (-1: the pending token); None means a chain.
    """

    tokens: Int64
    parents: Int64 | None = None


NO_DRAFT = Draft(tokens=np.empty(0, np.int64))


class Drafter(Protocol):
    """Proposes tokens that may follow a context."""

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """At most `max_tokens` tokens to follow `context` int64 [n] (prompt and everything emitted); may be none.

        The context is a view of a buffer that grows: copy what is kept.
        """
