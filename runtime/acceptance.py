"""Which drafts are kept: the longest prefix that equals the target's own tokens (pure functions)."""

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def accepted_prefix(draft: Int64, next_tokens: Int64) -> int:
    """Number of leading drafts that are the target's choice, 0..K.

    `draft` int64 [K]; `next_tokens` int64 [K+1], the target's token after the pending token and after each draft. The
    round then emits `next_tokens[: accepted + 1]`: the kept drafts, and the correction or bonus token behind them.
    """
    different = np.flatnonzero(draft != next_tokens[: len(draft)])
    return int(different[0]) if len(different) else len(draft)
