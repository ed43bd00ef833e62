"""The tree that a draft head grows in a round: nodes with their probabilities, and which positions are to be fed next.

EAGLE-2 (arXiv 2406.16858), section 4: nodes are expanded by the product of the head's probabilities along their path,
and verified by it. Here no level is fixed: each step expands the likeliest nodes wherever they are.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.draft_head import WIDEST_STEP

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

# Nodes that one step expands, at most: a position more takes little beside reading the head's weights.
MOST_EXPANDED = 4
# Nodes at this depth, counted from 0, are not expanded any more: a step has no room for their paths.
_DEEPEST = WIDEST_STEP // MOST_EXPANDED
# Children with a smaller share are never verified.
_LEAST_SHARE = 0.005
# Bounds of the head's probability of a token, given what it follows: guesses between two of them are counted together.
_BOUNDS = (0.01, 0.02, 0.04, 0.07, 0.11, 0.16, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_MIDDLES = tuple((low + high) / 2 for low, high in zip((0.0, *_BOUNDS), (*_BOUNDS, 1.0), strict=True))


def evidence_of(probability: float) -> int:
    """The number under which guesses of about this probability are counted."""
    return bisect.bisect_right(_BOUNDS, probability)


def probability_of(evidence: int) -> float:
    """What the head says of guesses with this number, about."""
    return _MIDDLES[min(max(evidence, 0), len(_MIDDLES) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Positions that expand nodes: `nodes` in the order in which they are fed, those that are expanded last.

    `first`: how many positions of the tree are in the head's cache before them. `parents` int64 [T] (engines.tree).
    """

    nodes: tuple[int, ...]
    first: int
    parents: Int64
    expanded: int


class HeadTree:
    """Nodes: tokens, each with the node that it follows (-1: the pending token), parents first.

    The head's cache has, after the committed positions, those of `_chain`: nodes that follow each other.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.evidence: list[int] = []
        # The head's own probability of each, given what it follows.
        self.shares: list[float] = []
        self.expanded: set[int] = set()
        # What each node's position reads: a row of `_states`.
        self._read: list[int] = []
        self._states: list[Float32] = []
        self._chain: list[int] = []

    def add(self, parent: int, tokens: Int64, shares: Float32, state: Float32) -> None:
        """The head's likeliest tokens after a node, int64 [k], with their probabilities, likeliest first.

        `state`: the hidden state [H] that their positions read.
        """
        self._states.append(state.copy())
        depth = 0 if parent < 0 else self.depths[parent] + 1
        for token, share in zip(tokens.tolist(), shares.tolist(), strict=True):
            if share < _LEAST_SHARE:
                break
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(depth)
            self.shares.append(share)
            self.evidence.append(evidence_of(share))
            self._read.append(len(self._states) - 1)

    def is_shallow(self, node: int) -> bool:
        """Whether a step that expands four such nodes feeds no more than `WIDEST_STEP` positions."""
        return self.depths[node] < _DEEPEST

    def path(self, node: int) -> list[int]:
        """The tokens from the pending one, which is not among them, to this node's."""
        return [self.tokens[one] for one in self._path(node)]

    def feed(self, nodes: Sequence[int]) -> Feed:
        """What is fed to expand these nodes: they, and what they follow as far as the cache does not have it."""
        paths = [self._path(node) for node in nodes]
        kept = 0
        while kept < len(self._chain) and all(
            kept < len(path) - 1 and path[kept] == self._chain[kept] for path in paths
        ):
            kept += 1
        targets = set(nodes)
        above = sorted({node for path in paths for node in path[kept:]} - targets)
        order = (*above, *nodes)
        places = {node: place for place, node in enumerate(order)}
        parents = np.array([places.get(self.parents[node], -1) for node in order], np.int64)
        self._chain = [*self._chain[:kept], *self._begins(order, parents)]
        self.expanded |= targets
        return Feed(nodes=order, first=kept, parents=parents, expanded=len(nodes))

    def states(self, feed: Feed) -> Float32:
        """The hidden states [T, H] that the positions read."""
        return np.stack([self._states[self._read[node]] for node in feed.nodes])

    def _path(self, node: int) -> list[int]:
        """From the first node after the pending token to this one."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    @staticmethod
    def _begins(order: Sequence[int], parents: Int64) -> list[int]:
        """The nodes at the front that follow each other: what comes after can be fed without them."""
        count = 1
        while count < len(order) and parents[count] == count - 1:
            count += 1
        return list(order[:count])
