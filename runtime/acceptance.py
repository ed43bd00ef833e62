"""Which drafts are kept: the longest path from the pending token that the target chooses itself."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# A row of the pass and the token that the target chose behind it → the row of the draft that is this token, or None.
Follow = Callable[[int, int], int | None]


def follow(draft: Int64, parents: Int64 | None = None) -> Follow:
    """How to walk down a draft: row 0 is the pending token's, row i + 1 that of draft i.

    `draft` int64 [K]; `parents` int64 [K] (runtime.drafters.Draft), or None for a chain.
    """
    tokens = draft.tolist()
    if parents is None:
        return lambda row, token: row + 1 if row < len(tokens) and tokens[row] == token else None
    rows = {
        (parent + 1, token): row for row, (parent, token) in enumerate(zip(parents.tolist(), tokens, strict=True), 1)
    }
    return lambda row, token: rows.get((row, token))


def follow_nothing(row: int, token: int) -> int | None:  # noqa: ARG001 - the form of `Follow`
    """There is no draft."""
    return None
