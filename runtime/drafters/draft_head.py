"""A draft head drafts: trees that it grows from the verifier's hidden states (EAGLE-3, arXiv 2503.01840)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.draft_head import DraftHeadSession, HeadTargets
from engines.session import Positions
from runtime.drafters.base import NO_DRAFT, Draft, Int64
from runtime.drafters.head_tree import HeadTree, probability_of
from runtime.kv_cache import common_length

Float32 = NDArray[np.float32]

# Nodes that one step expands, at most: a position more takes little beside reading the head's weights.
_MOST_EXPANDED = 4
# Of the likeliest node that is left: those that are less likely wait for a step of their own.
_LEAST_RATIO = 0.5
# The newest pass's share in what a step is expected to take.
_NEWEST = 0.1
# Steps that the head is asked for where nobody says what they take.
_MOST_STEPS = 6
# Positions that are kept until they are fed, before they are fed anyway.
_MOST_PENDING = 256


@dataclass(slots=True, kw_only=True)
class _Slot:
    """What a slot of the head's cache has: positions from `begin` on, of the sequence that begins with `tokens`."""

    begin: int = 0
    tokens: Int64 = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def end(self) -> int:
        """The position after the last one: position i was fed with token i + 1."""
        return max(self.begin, len(self.tokens) - 1)


class DraftHeadCache:
    """A loaded head, which the sequences of an engine share; used by one thread at a time (runtime.scheduler)."""

    def __init__(self, session: DraftHeadSession, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds, by which steps are timed."""
        self.session = session
        self.slots = [_Slot() for _ in range(session.num_slots)]
        self._clock = clock
        self._step_seconds = 0.0

    @property
    def step_seconds(self) -> float:
        """What a step takes: of passes of a few positions, as seen so far; 0 before the first."""
        return self._step_seconds

    def run(self, batch: Sequence[Positions], states: Float32) -> HeadTargets:
        """Make a pass."""
        start = self._clock()
        told = self.session.run(batch, states)
        if len(states) <= _MOST_EXPANDED:
            took = self._clock() - start
            known = self._step_seconds
            self._step_seconds = took if not known else known + _NEWEST * (min(took, 4 * known) - known)
        return told


class HeadDrafter:
    """One sequence's drafts from a head.

    `see` tells it the verifier's hidden states of committed positions; `start` and `grow` make a round's tree step by
    step, so that a controller can stop where a step does not pay; `propose` makes a whole one.
    """

    name = "eagle"

    def __init__(self, cache: DraftHeadCache, *, trees: bool = True, slot: Callable[[], int] = lambda: 0) -> None:
        """`trees`: whether `propose` may make one. `slot`: where the verifier's cache has the sequence."""
        self._cache, self._trees, self._slot = cache, trees, slot
        self.tree = HeadTree()
        # Positions that were not fed yet: the first one, and their hidden states by layer.
        self._first = 0
        self._states: list[tuple[Float32, ...]] = []
        self._pending = 0
        # Committed positions before the tree.
        self._committed = 0

    @property
    def step_seconds(self) -> float:
        """As `DraftHeadCache` has it."""
        return self._cache.step_seconds

    def prior(self, evidence: int) -> float:
        """As a `Drafter` may have it: the head's own probability."""
        return probability_of(evidence)

    def see(self, tokens: Int64, first: int, states: Sequence[Float32]) -> None:
        """The verifier's hidden states, float32 [n, hidden] by layer, of committed positions from `first` on.

        Args:
            tokens: the sequence so far, int64 [first + n or more].
        """
        if not self._pending:
            self._first = first
        elif self._first + self._pending != first:
            self._first, self._states, self._pending = first, [], 0
        self._states.append(tuple(one.copy() for one in states))
        self._pending += len(states[0])
        while self._pending >= _MOST_PENDING and len(tokens) > self._first + 1:
            self._feed(tokens, min(self._pending, len(tokens) - 1 - self._first))

    def start(self, context: Int64) -> bool:
        """Begin a round's tree with the likeliest tokens after `context`; False where the head knows nothing of it."""
        self.tree = HeadTree()
        if not self._pending or self._first + self._pending != len(context) - 1:
            return False
        told = self._feed(context, self._pending)
        self._committed = len(context) - 1 - self._cache.slots[self._slot()].begin
        self.tree.add(-1, told.tokens[-1], told.log_probabilities[-1], told.hidden_states[-1])
        return True

    def grow(self, nodes: Sequence[int]) -> None:
        """Expand nodes of the tree."""
        feed = self.tree.feed(nodes)
        positions = Positions(
            tokens=np.array([self.tree.tokens[node] for node in feed.nodes], np.int64),
            cache_length=self._committed + feed.first,
            num_logits=feed.expanded,
            slot=self._slot(),
            parents=feed.parents,
        )
        told = self._cache.run([positions], self.tree.states(feed))
        for place, node in enumerate(nodes):
            self.tree.add(node, told.tokens[place], told.log_probabilities[place], told.hidden_states[place])

    def frontier(self, reached: Sequence[float], most: int) -> list[int]:
        """The nodes that the next step expands: the likeliest ones that were not, at most `most`, or none.

        `reached`: how likely each node is to be reached.
        """
        left = [node for node in range(len(reached)) if node not in self.tree.expanded]
        left.sort(key=lambda node: -reached[node])
        if not left:
            return []
        least = _LEAST_RATIO * reached[left[0]]
        return [node for node in left[: min(most, _MOST_EXPANDED)] if reached[node] >= least]

    def draft(self) -> Draft:
        """The whole tree."""
        tree = self.tree
        return Draft(
            tokens=np.array(tree.tokens, np.int64),
            parents=np.array(tree.parents, np.int64),
            evidence=np.array(tree.evidence, np.int64),
        )

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`: the `max_tokens` likeliest nodes by the head's own word (EAGLE-2, section 4.2)."""
        if max_tokens < 1 or not self.start(context):
            return NO_DRAFT
        for _ in range(min(max_tokens, _MOST_STEPS + 1) - 1):
            nodes = self.frontier(self._reached(), _MOST_EXPANDED if self._trees else 1)
            if not nodes:
                break
            self.grow(nodes)
        reached = self._reached()
        chosen = sorted(sorted(range(len(reached)), key=lambda node: -reached[node])[:max_tokens])
        if not self._trees:
            # The first tokens of each expansion follow each other.
            chosen = [node for node in chosen if self._is_first(node)]
        places = {-1: -1} | {node: place for place, node in enumerate(chosen)}
        tree = self.tree
        return Draft(
            tokens=np.array([tree.tokens[node] for node in chosen], np.int64),
            parents=None if not self._trees else np.array([places[tree.parents[node]] for node in chosen], np.int64),
            evidence=np.array([tree.evidence[node] for node in chosen], np.int64),
        )

    def _reached(self) -> list[float]:
        """The product of the head's probabilities along each node's path."""
        reached: list[float] = []
        for parent, share in zip(self.tree.parents, self.tree.shares, strict=True):
            reached.append(share if parent < 0 else share * reached[parent])
        return reached

    def _is_first(self, node: int) -> bool:
        """Whether a node is on the path of likeliest tokens."""
        while node >= 0:
            parent = self.tree.parents[node]
            if self.tree.parents.index(parent) != node:
                return False
            node = parent
        return True

    def _feed(self, tokens: Int64, count: int) -> HeadTargets:
        """Feed the first `count` of the positions that wait; what the head says after the last one."""
        session, slot = self._cache.session, self._slot()
        held = self._cache.slots[slot]
        # What the slot has of this sequence; positions in between are left out, and what comes before them.
        known = min(held.end, common_length(held.tokens, tokens) - 1)
        if not held.begin <= self._first <= known:
            held.begin = known = self._first
        skipped = min(known - self._first, count - 1)
        states = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*self._states, strict=True)]
        told: HeadTargets | None = None
        most = session.contract.prefill_chunk
        for first in range(self._first + skipped, self._first + count, most):
            end = min(first + most, self._first + count)
            rows = slice(first - self._first, end - self._first)
            positions = Positions(
                tokens=tokens[first + 1 : end + 1], cache_length=first - held.begin, num_logits=1, slot=slot
            )
            told = self._cache.run([positions], session.fuse([part[rows] for part in states]))
        assert told is not None
        self._first += count
        self._pending -= count
        self._states = [tuple(part[count:] for part in states)] if self._pending else []
        held.tokens = tokens[: self._first + 1].copy()
        return told
