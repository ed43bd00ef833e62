"""Rows of one verify call as a tree: each new row follows another new row, or the committed context.

`parents` int64 [T] holds, for each row fed, the index of the row that it follows, or -1 for the committed context; a
parent always comes before its children. A chain is [-1, 0, 1, …].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from quasar.errors import GenerationError

Int64 = NDArray[np.int64]


def check_parents(
    parents: Sequence[int] | Int64, rows: int, contract: Contract, *, takes_trees: bool | None = None
) -> Int64:
    """The parents as int64 [rows].

    `takes_trees`: whether the loaded graph does; None: as the contract says of the portable one.

    Raises `GenerationError` unless every row follows an earlier one or none, and the engine takes trees so wide.
    """
    takes_trees = contract.tree_mask if takes_trees is None else takes_trees
    if not takes_trees or rows > contract.max_width:
        has = f"trees of up to {contract.max_width} rows" if takes_trees else "no tree mask"
        raise GenerationError(f"a tree of {rows} rows was fed, but this engine has {has}: build with --tree-mask")
    checked = np.asarray(parents, np.int64)
    if checked.shape != (rows,) or (checked < -1).any() or (checked >= np.arange(rows)).any():
        raise GenerationError(
            f"parents are {checked.tolist()}; for {rows} rows, as many indices of earlier rows (or -1) were expected"
        )
    return checked


def depths(parents: Int64) -> Int64:
    """int64 [T]: how many new rows lie above each row; its position is `cache_length + depth`."""
    result = np.zeros(len(parents), np.int64)
    for row, parent in enumerate(parents.tolist()):
        if parent >= 0:
            result[row] = result[parent] + 1
    return result


def ancestor_mask(parents: Int64) -> NDArray[np.bool_]:
    """Bool [T, T]: the contract's `tree_mask`, row r sees itself and the rows that it follows."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for row, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[row] |= mask[parent]
    return mask
