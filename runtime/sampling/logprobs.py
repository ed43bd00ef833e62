"""Log-probabilities of emitted tokens, from the model's own logits: before biases, penalties and temperature."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """An emitted token's natural log-probability, and the most likely tokens' at its place, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RowLogprobs:
    """Log-probabilities of one row; it keeps what it needs of the logits, which may be changed afterwards."""

    def __init__(self, logits: NDArray[np.float32], count: int) -> None:
        largest = np.float64(logits.max())
        total = np.exp((logits - np.float32(largest)).astype(np.float32)).sum(dtype=np.float64)
        self._log_total = float(largest + np.log(total))
        self._logits = logits.copy()
        self._count = count

    def of(self, token: int) -> TokenLogprob:
        """The chosen token's entry; ties among the most likely go to lower ids."""
        count = min(self._count, len(self._logits))
        top: tuple[tuple[int, float], ...] = ()
        if count:
            least = np.partition(self._logits, len(self._logits) - count)[len(self._logits) - count]
            likely = np.flatnonzero(self._logits >= least)
            likely = likely[np.argsort(-self._logits[likely], kind="stable")][:count]
            top = tuple((int(one), float(self._logits[one]) - self._log_total) for one in likely)
        return TokenLogprob(token_id=token, logprob=float(self._logits[token]) - self._log_total, top=top)
