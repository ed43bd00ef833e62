"""The embedding in 16 bits: in the type that holds a table's values exactly, else in the one that loses less."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quasar.numerics import Float32

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
# Rows that are converted at a time: a table of 1 GB needs no second and third one.
_ROWS_AT_ONCE = 4096


def in_16_bits(table: NDArray[Any]) -> NDArray[Any]:
    """A table [rows, columns] in 16 bits; one that is in 16 bits already is returned as it is.

    Exact where a type allows. Else rounded to nearest: in float16, which loses at most 2^-11 of a normal value, unless
    bfloat16 (2^-8) loses less over the whole table, in squares. That is where a value overflows float16, or where most
    are so small that float16 holds few of their bits. A few such rows, those of tokens that were never trained, do not
    decide: float16 loses at most 2^-25 of them, far below the epsilon of the norm that reads them, and bfloat16 would
    take bits from every other token.
    """
    if table.dtype.itemsize <= 2:
        return table
    exact = exact_type(table)
    kind = exact if exact is not None else min((FLOAT16, BFLOAT16), key=lambda kind: _squared_loss(table, kind))
    return _converted(table, kind)


def exact_type(table: NDArray[Any]) -> np.dtype[Any] | None:
    """The type of 16 bits that holds every value of a table exactly; None if neither does."""
    return next((kind for kind in (BFLOAT16, FLOAT16) if _is_exact(table, kind)), None)


def _is_exact(table: NDArray[Any], kind: np.dtype[Any]) -> bool:
    return all(np.array_equal(_rounded(rows, kind), rows.astype(np.float32, copy=False)) for rows in _blocks(table))


def _squared_loss(table: NDArray[Any], kind: np.dtype[Any]) -> float:
    losses = (_rounded(rows, kind).astype(np.float64) - rows for rows in _blocks(table))
    return sum(float(np.square(loss).sum()) for loss in losses)


def _rounded(rows: NDArray[Any], kind: np.dtype[Any]) -> Float32:
    # What overflows becomes infinite, and so loses the most.
    with np.errstate(over="ignore"):
        return rows.astype(kind).astype(np.float32)


def _converted(table: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    converted: NDArray[Any] = np.concatenate([rows.astype(kind) for rows in _blocks(table)])
    return converted


def _blocks(table: NDArray[Any]) -> list[NDArray[Any]]:
    """A table in parts of some rows each, which copy nothing."""
    return [table[start : start + _ROWS_AT_ONCE] for start in range(0, len(table), _ROWS_AT_ONCE)]
