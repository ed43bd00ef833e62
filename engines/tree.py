"""Tokens of one verify call as a tree: each new token follows another new token, or the committed context.

`parents` int64 [T] holds, for each token fed, the index of the one that it follows, or -1 for the committed context; a
parent always comes before its children. A chain is [-1, 0, 1, …].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from quasar.errors import GenerationError

Int64 = NDArray[np.int64]


def check_parents(
    parents: Sequence[int] | Int64, width: int, contract: Contract, *, takes_trees: bool | None = None
) -> Int64:
    """The parents as int64 [T].

    `takes_trees`: whether the loaded graph does; None: as the contract says of the portable one.

    Raises `GenerationError` unless every token follows an earlier one or none, and the engine takes trees so wide.
    """
    takes_trees = contract.tree_mask if takes_trees is None else takes_trees
    if not takes_trees or width > contract.max_width:
        has = f"trees of up to {contract.max_width} tokens" if takes_trees else "no tree mask"
        raise GenerationError(f"a tree of {width} tokens was fed, but this engine has {has}: build with --tree-mask")
    checked = np.asarray(parents, np.int64)
    if checked.shape != (width,) or (checked < -1).any() or (checked >= np.arange(width)).any():
        raise GenerationError(
            f"parents are {checked.tolist()}; for {width} tokens, as many indices of earlier ones (or -1) were expected"
        )
    return checked


def depths(parents: Int64) -> Int64:
    """int64 [T]: how many ancestors each new token has among the new ones; its position is `cache_length + depth`."""
    result = np.zeros(len(parents), np.int64)
    for index, parent in enumerate(parents.tolist()):
        if parent >= 0:
            result[index] = result[parent] + 1
    return result


def ancestor_mask(parents: Int64) -> NDArray[np.bool_]:
    """Bool [T, T]: the contract's `tree_mask`, token r sees itself and its ancestors."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for index, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[index] |= mask[parent]
    return mask
