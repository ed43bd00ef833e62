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


def pack_trees(
    trees: Sequence[tuple[Sequence[int] | Int64, int]], contract: Contract
) -> tuple[Int64, NDArray[np.bool_]]:
    """Of several trees (parents, width), checked as `check_parents` does: depths [ΣT], and masks [ΣT²] in one row.

    They are those of `depths` and `ancestor_mask`, one tree's after the other's, but found for all tokens at once:
    from generation to generation, since a pass of many sequences cannot wait for its tokens one by one.
    """
    widths, parents, first = _joined(trees, contract)
    token = np.arange(len(parents)) - first
    squares = widths * widths
    # Where a token's row of the masks begins.
    row = np.repeat(np.cumsum(squares) - squares, widths) + token * np.repeat(widths, widths)
    masks = np.zeros(int(squares.sum()), np.bool_)
    masks[row + token] = True
    depth = np.zeros(len(parents), np.int64)
    left = np.flatnonzero(parents >= 0)
    above = parents[left]
    while len(left):
        masks[row[left] + above] = True
        depth[left] += 1
        above = parents[first[left] + above]
        has_more = above >= 0
        left, above = left[has_more], above[has_more]
    return depth, masks


def pack_paths(trees: Sequence[tuple[Sequence[int] | Int64, int]], contract: Contract) -> tuple[Int64, Int64]:
    """Of several trees, as `pack_trees` takes them: depths int64 [ΣT], and paths int64 [ΣT, max_width].

    Column d of a token's path is the index, in its tree, of its ancestor at depth d; the token itself is the last one.
    """
    _, parents, first = _joined(trees, contract)
    paths = np.zeros((len(parents), contract.max_width), np.int64)
    depth = np.zeros(len(parents), np.int64)
    token = np.arange(len(parents))
    # First from each token up to the root, to count; then once more, to write.
    left, above = token, parents
    while len(left := left[above >= 0]):
        depth[left] += 1
        above = above[above >= 0]
        above = parents[first[left] + above]
    left, at, place = token, token - first, depth
    while len(left):
        paths[left, place] = at
        at = parents[first[left] + at]
        has_more = at >= 0
        left, at, place = left[has_more], at[has_more], place[has_more] - 1
    return depth, paths


def _joined(trees: Sequence[tuple[Sequence[int] | Int64, int]], contract: Contract) -> tuple[Int64, Int64, Int64]:
    """Widths int64 [trees], parents int64 [ΣT], and each token's first token of its tree, int64 [ΣT]; all checked."""
    widths = np.array([width for _, width in trees], np.int64)
    parents = np.concatenate([np.asarray(one, np.int64) for one, _ in trees])
    first = np.repeat(np.cumsum(widths) - widths, widths)
    fits = len(first) == len(parents) and widths.max() <= contract.max_width
    fits = fits and not ((parents < -1) | (parents >= np.arange(len(parents)) - first)).any()
    if not fits or any(len(one) != width for one, width in trees):
        for one, width in trees:
            check_parents(one, width, contract, takes_trees=True)
    return widths, parents, first
