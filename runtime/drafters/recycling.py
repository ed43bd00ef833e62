"""Token recycling (arXiv 2408.08696): the verifier's likeliest tokens after a token when it was last fed.

Every pass tells its k likeliest tokens after each position; chains and trees of them are the next drafts. Rejected
drafts are not wasted: the successors at their positions are used, too.
"""

import functools
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from quasar.errors import GenerationError
from runtime.drafters.base import NO_DRAFT, Draft, Int64
from runtime.drafters.persistent_successors import PersistentSuccessors

# Successors that are kept of each token, and how deep drafts go: more brought nothing (docs/drafters.md, "Constants").
KEPT, _DEEPEST = 4, 3
# How often a token's successor was right, by rank; the product ranks the places of a tree.
_PRIORS = (0.35, 0.12, 0.06, 0.04)
# A warm start's are of another sequence.
_WARM_SHARE = 0.6


class Recycling:
    """Successors as the verifier saw them in this sequence; others serve for tokens that it has not fed yet.

    Needs an engine that tells them (`contract.top_k`): without, nothing but `warm` is drafted.
    """

    name = "recycling"

    def __init__(
        self,
        *,
        branches: int = 1,
        warm: Mapping[int, Sequence[int]] | None = None,
        persistent: PersistentSuccessors | None = None,
    ) -> None:
        """Make one.

        Args:
            branches: 1 drafts a chain; more, up to 4, a tree, for engines on which trees are exact.
            warm: token → successors, likeliest first, from other sequences.
            persistent: successors of the user's earlier sequences, which come before `warm`; this one's are added.
                What was said before then shows in how long answers take.
        """
        if not 1 <= branches <= KEPT:
            raise GenerationError(f"branches is {branches}; 1 to {KEPT} was expected")
        self._branches = branches
        self._warm, self._persistent = warm or {}, persistent
        self._successors: dict[int, list[int]] = {}

    def observe(self, tokens: Int64, successors: Int64) -> None:
        """As `ObservingDrafter`."""
        self._successors.update(zip(tokens.tolist(), successors[:, :KEPT].tolist(), strict=True))
        if self._persistent is not None:
            self._persistent.update(tokens, successors)

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        if max_tokens <= 0:
            return NO_DRAFT
        tokens: list[int] = []
        parents: list[int] = []
        evidence: list[int] = []
        # Place in the shape → place in the draft, of those whose token is known; last (-1) the pending token.
        shape = tree_shape(self._branches, max_tokens)
        places = [-1] * (len(shape) + 1)
        last = int(context[-1])
        for index, (above, rank, depth) in enumerate(shape):
            parent = places[above]
            places[index] = _UNKNOWN
            if parent == _UNKNOWN:
                continue
            token = last if parent == -1 else tokens[parent]
            seen = self._successors.get(token)
            warm = seen is None
            known = self._of_other_sequences(token) if seen is None else seen
            if known is None or rank >= len(known):
                continue
            places[index] = len(tokens)
            tokens.append(known[rank])
            parents.append(parent)
            evidence.append((depth * 2 + warm) * KEPT + rank)
        if not tokens:
            return NO_DRAFT
        return Draft(
            tokens=np.array(tokens, np.int64),
            parents=None if self._branches == 1 else np.array(parents, np.int64),
            evidence=np.array(evidence, np.int64),
        )

    def _of_other_sequences(self, token: int) -> Sequence[int] | None:
        kept = None if self._persistent is None else self._persistent.get(token)
        return self._warm.get(token) if kept is None else kept

    def prior(self, evidence: int) -> float:
        """The probability of a guess, before any was seen."""
        return _PRIORS[evidence % KEPT] * (_WARM_SHARE if evidence // KEPT % 2 else 1.0)


_UNKNOWN = -2


@functools.cache
def tree_shape(branches: int, count: int) -> tuple[tuple[int, int, int], ...]:
    """The likeliest places of a tree, parents first: what each follows (-1: the pending token), its rank, its depth."""
    shape: list[tuple[int, int, int]] = []
    queue = [(-_PRIORS[rank], -1, rank, 0) for rank in range(branches)]
    heapq.heapify(queue)
    while queue and len(shape) < count:
        negative, above, rank, depth = heapq.heappop(queue)
        place = len(shape)
        shape.append((above, rank, depth))
        if depth + 1 < _DEEPEST:
            for below in range(branches):
                heapq.heappush(queue, (negative * _PRIORS[below], place, below, depth + 1))
    return tuple(shape)
