"""The likeliest successors of tokens over some text, as one small array: token recycling starts from it.

The file is numpy's .npy, int32 [n, 1 + k]: a token, ascending, and its successors, likeliest first; -1 where there are
fewer.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quasar.errors import DamagedEngineError
from quasar.files import atomic_path

# The file in an engine directory.
SUCCESSORS = "successors.npy"

Int64 = NDArray[np.int64]
Successors = Mapping[int, Sequence[int]]


def count_successors(pieces: Iterable[tuple[Int64, Int64]], k: int) -> dict[int, list[int]]:
    """The k tokens that ranked highest after each token.

    Args:
        pieces: of a text, int64 [n], with the verifier's likeliest tokens after each place, int64 [n, m].

    A token of rank r after a place counts 1 / (1 + r); ties go to the lower id.
    """
    weights: dict[int, dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
    shares: list[Fraction] = []
    for tokens, likeliest in pieces:
        # Exact, so that a tie is one.
        shares = shares or [Fraction(1, 1 + rank) for rank in range(likeliest.shape[1])]
        for token, ranked in zip(tokens.tolist(), likeliest.tolist(), strict=True):
            for share, successor in zip(shares, ranked, strict=True):
                weights[token][successor] += share
    return {
        token: sorted(found, key=lambda successor: (-found[successor], successor))[:k]
        for token, found in sorted(weights.items())
    }


def write_successors(path: Path, successors: Successors, k: int, mode: int = 0o644) -> None:
    """Write the file, whole or not at all."""
    table = np.full((len(successors), 1 + k), -1, np.int32)
    for row, (token, found) in zip(table, sorted(successors.items()), strict=True):
        row[0] = token
        row[1 : 1 + len(found)] = found
    with atomic_path(path, mode) as partial, partial.open("wb") as file:
        np.save(file, table)


def read_successors(path: Path, vocab_size: int) -> dict[int, list[int]]:
    """Token → successors; raises `DamagedEngineError` if the file cannot be read or holds what no token is."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedEngineError(f"{path} cannot be read ({error}): build the engine again") from None
    if not isinstance(table, np.ndarray):
        raise DamagedEngineError(f"{path} holds an archive; one array was expected: build the engine again")
    fits = table.dtype == np.int32 and table.ndim == 2 and table.shape[1] >= 1
    if not fits or (table < -1).any() or (table >= vocab_size).any() or (table[:, 0] < 0).any():
        raise DamagedEngineError(
            f"{path} holds {table.dtype} {list(table.shape)}; int32 [n, 1 + k] of token ids was expected: build the "
            "engine again"
        )
    return {row[0]: [token for token in row[1:] if token >= 0] for row in table.tolist()}
