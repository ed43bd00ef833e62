"""The likeliest tokens of rows of logits with their log probabilities: what a draft head learns from."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# Tokens that are kept after each position: nearly all of the mass of what a model answers.
KEPT_TOKENS = 32
# Logits whose largest stands for them all while the likeliest are looked for.
_BLOCK = 64


def likely_tokens(logits: Float32, count: int = KEPT_TOKENS) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """Ids int32 [M, count] of the likeliest tokens, likeliest first, and log probabilities float16 [M, count].

    Args:
        logits: float32 [M, V]. Where V is below `count`, log probabilities of the rest are -inf and ids 0.
    """
    ids = np.zeros((len(logits), count), np.int32)
    values = np.full((len(logits), count), -np.inf, np.float32)
    for row, one in enumerate(logits):
        chosen = _largest(one, count)
        largest = one[chosen[0]]
        total = np.log(np.exp(one - largest).sum(dtype=np.float64)) + float(largest)
        ids[row, : len(chosen)] = chosen
        values[row, : len(chosen)] = one[chosen] - total
    return ids, values.astype(np.float16)


def _largest(row: Float32, count: int) -> NDArray[np.int64]:
    """Places of the largest values, largest first, ties by lower place; all of them where there are no more."""
    count = min(count, len(row))
    whole = len(row) // _BLOCK
    candidates: NDArray[Any]
    if whole > count:
        # The count-th largest of blocks' maxima: so many values are no smaller, and few others are.
        maxima = row[: whole * _BLOCK].reshape(whole, _BLOCK).max(axis=1)
        floor = np.partition(maxima, whole - count)[whole - count]
        candidates = np.flatnonzero(row >= floor)
    else:
        candidates = np.arange(len(row))
    order = np.argsort(-row[candidates], kind="stable")[:count]
    chosen: NDArray[np.int64] = candidates[order]
    return chosen
