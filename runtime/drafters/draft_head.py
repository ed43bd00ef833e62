"""A draft head drafts: trees that it grows from the verifier's hidden states (EAGLE-3, arXiv 2503.01840)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.draft_head import WIDEST_STEP, DraftHeadSession, HeadTargets
from engines.session import Positions
from runtime.drafters.base import NO_DRAFT, Draft, Int64
from runtime.drafters.head_tree import MOST_EXPANDED, HeadTree, probability_of
from runtime.kv_cache import common_length

Float32 = NDArray[np.float32]

# Of the likeliest node that is left: those that are less likely wait for a step of their own.
_LEAST_RATIO = 0.5
# The newest pass's share in what a step is expected to take.
_NEWEST = 0.1
# Steps that the head is asked for where nobody says what they take.
_MOST_STEPS = 6
# Positions of a first step beyond which it makes up for earlier rounds.
_MOST_OF_A_ROUND = 8
# Of a head's probability, what the tokens that a grammar lets through have at least: they are not divided by zero.
_LEAST_LEFT = 1e-6
# Positions that wait until they are fed, before they are fed anyway.
_MOST_PENDING = 255


@dataclass(slots=True, kw_only=True)
class _Slot:
    """What a slot of the head's cache has: positions from `begin` on, of the sequence that begins with `tokens`."""

    begin: int = 0
    tokens: Int64 = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def end(self) -> int:
        """The position after the last one: position i was fed with token i + 1."""
        return max(self.begin, len(self.tokens) - 1)

    def known(self, tokens: Int64) -> int:
        """The position after the last one that serves a sequence which begins with these tokens."""
        return min(self.end, common_length(self.tokens, tokens) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFeed:
    """Positions of one sequence, and the hidden states float32 [T, H] that they read."""

    positions: Positions
    states: Float32


class Guide(Protocol):
    """What may follow an answer, by its grammar."""

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""

    def permits(self, path: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Whether each of these tokens may come where the tokens of `path` come before it."""


class DraftHeadCache:
    """A loaded head, which the sequences of an engine share; used by one thread at a time (runtime.scheduler)."""

    def __init__(self, session: DraftHeadSession, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds, by which steps are timed."""
        self.session = session
        self.slots = [_Slot() for _ in range(session.num_slots)]
        self._clock = clock
        self._step_seconds = 0.0
        self._ran = False

    @property
    def step_seconds(self) -> float:
        """What a step takes: of passes of a few positions, as seen so far; 0 before the first."""
        return self._step_seconds

    def step(self, drafters: Sequence["HeadDrafter"], feeds: Sequence[HeadFeed]) -> None:
        """One step for several sequences, each of which takes what the head says after its positions.

        It is one pass, or as many as their positions take.
        """
        held = 0
        for count, feed in enumerate(feeds):
            held += len(feed.states)
            if count and held > self.session.max_positions:
                self.step(drafters[:count], feeds[:count])
                self.step(drafters[count:], feeds[count:])
                return
        states = feeds[0].states if len(feeds) == 1 else np.concatenate([feed.states for feed in feeds])
        told = self.run([feed.positions for feed in feeds], states)
        first = 0
        for drafter, feed in zip(drafters, feeds, strict=True):
            own = slice(first, first + feed.positions.num_logits)
            drafter.take(
                HeadTargets(
                    tokens=told.tokens[own],
                    log_probabilities=told.log_probabilities[own],
                    hidden_states=told.hidden_states[own],
                )
            )
            first = own.stop

    def forget(self, slot: int) -> None:
        """As `FollowingCache` (runtime.slots)."""
        self.slots[slot] = _Slot()

    def copy(self, source: int, target: int, tokens: Int64) -> None:
        """As `FollowingCache`: nothing where the target's slot has as much of these tokens itself."""
        held, other = self.slots[target], self.slots[source]
        known, end = held.known(tokens), other.known(tokens)
        if end <= max(known, other.begin):
            return
        first = max(known, other.begin) if held.begin == other.begin else other.begin
        self.session.copy_rows(source, target, first - other.begin, end - other.begin)
        self.slots[target] = _Slot(begin=other.begin, tokens=tokens[: end + 1].copy())

    def run(self, batch: Sequence[Positions], states: Float32) -> HeadTargets:
        """Make a pass."""
        start = self._clock()
        told = self.session.run(batch, states)
        # The first pass of all warms up.
        was_first, self._ran = not self._ran, True
        if len(states) <= MOST_EXPANDED and not was_first:
            took = self._clock() - start
            known = self._step_seconds
            self._step_seconds = took if not known else known + _NEWEST * (min(took, 4 * known) - known)
        return told


class HeadDrafter:
    """One sequence's drafts from a head.

    `see` tells it the verifier's hidden states of committed positions; `begin`, `expand` and `take` make a round's tree
    step by step, so that a controller can stop where a step does not pay; `propose` makes a whole one.
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
        # Committed positions before the tree, and the nodes that are being expanded (-1: the pending token).
        self._committed = 0
        self._expanding: list[int] = []
        # Positions that the latest tree's first step was fed.
        self._begun_with = 0
        self._guide: Guide | None = None

    @property
    def caught_up(self) -> bool:
        """Whether the latest tree's first step was fed more than a round brings: a prompt, or what was left aside."""
        return self._begun_with > _MOST_OF_A_ROUND

    @property
    def cache(self) -> DraftHeadCache:
        """The head, which other sequences use as well."""
        return self._cache

    def follow(self, guide: Guide) -> None:
        """Draft what a grammar lets through alone, and nothing where it forces the next token."""
        self._guide = guide

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
        if self._pending > _MOST_PENDING:
            # A round begins with the last one.
            feed = self._feed(tokens, self._pending - 1)
            self._cache.run([feed.positions], feed.states)

    def begin(self, context: Int64) -> HeadFeed | None:
        """Begin a round's tree: what is fed so that the head says what may follow `context`.

        None where it knows nothing of it, or there is nothing to guess.
        """
        self.tree, self._begun_with = HeadTree(), 0
        if self._guide is not None and self._guide.forced():
            return None
        if not self._pending or self._first + self._pending != len(context) - 1:
            return None
        if len(context) + WIDEST_STEP > self._cache.session.contract.capacity:
            return None
        self._begun_with = self._pending
        feed = self._feed(context, self._pending)
        self._committed = len(context) - 1 - self._cache.slots[self._slot()].begin
        self._expanding = [-1]
        return feed

    def expand(self, nodes: Sequence[int]) -> HeadFeed:
        """What is fed to expand nodes of the tree."""
        feed = self.tree.feed(nodes)
        self._expanding = list(nodes)
        positions = Positions(
            tokens=np.array([self.tree.tokens[node] for node in feed.nodes], np.int64),
            cache_length=self._committed + feed.first,
            num_logits=feed.expanded,
            slot=self._slot(),
            parents=feed.parents,
        )
        return HeadFeed(positions=positions, states=self.tree.states(feed))

    def take(self, told: HeadTargets) -> None:
        """What the head says after what was fed last."""
        # Where a head's numbers are none it says nothing: the verifier's may be sound.
        told_shares = np.nan_to_num(np.exp(told.log_probabilities), nan=0.0)
        rows = zip(self._expanding, told.tokens, told_shares, told.hidden_states, strict=True)
        for node, tokens, shares, state in rows:
            if self._guide is not None:
                tokens, shares = _permitted(self._guide, self.tree.path(node), tokens, shares)
            self.tree.add(node, tokens, shares, state)

    def frontier(self, reached: Sequence[float], most: int) -> list[int]:
        """The nodes that the next step expands: the likeliest ones that were not, at most `most`, or none.

        `reached`: how likely each node is to be reached.
        """
        left = [node for node in range(len(reached)) if node not in self.tree.expanded and self.tree.is_shallow(node)]
        left.sort(key=lambda node: -reached[node])
        if not left:
            return []
        least = _LEAST_RATIO * reached[left[0]]
        return [node for node in left[: min(most, MOST_EXPANDED)] if reached[node] >= least]

    def draft(self) -> Draft:
        """The whole tree."""
        tree = self.tree
        return Draft(
            tokens=np.array(tree.tokens, np.int64),
            parents=np.array(tree.parents, np.int64),
            evidence=np.array(tree.evidence, np.int64),
        )

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`: the `max_tokens` likeliest nodes by the head's own word (EAGLE-2, section 4.2).

        Where a grammar forces tokens, these.
        """
        if self._guide is not None and (forced := self._guide.forced()[:max_tokens]):
            return Draft(tokens=np.array(forced, np.int64))
        feed = self.begin(context) if max_tokens > 0 else None
        if feed is None:
            return NO_DRAFT
        self._cache.step([self], [feed])
        for _ in range(min(max_tokens, _MOST_STEPS + 1) - 1):
            nodes = self.frontier(self._reached(), MOST_EXPANDED if self._trees else 1)
            if not nodes:
                break
            self._cache.step([self], [self.expand(nodes)])
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

    def _feed(self, tokens: Int64, count: int) -> HeadFeed:
        """Feed the first `count` of the positions that wait, but for the last chunk of them, which is returned."""
        session, slot = self._cache.session, self._slot()
        held = self._cache.slots[slot]
        # What the slot has of this sequence; positions in between are left out, and what comes before them.
        known = held.known(tokens)
        if not held.begin <= self._first <= known:
            held.begin = known = self._first
        skipped = min(known - self._first, count - 1)
        states = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*self._states, strict=True)]
        feed: HeadFeed | None = None
        most = session.contract.prefill_chunk
        for first in range(self._first + skipped, self._first + count, most):
            if feed is not None:
                self._cache.run([feed.positions], feed.states)
            end = min(first + most, self._first + count)
            rows = slice(first - self._first, end - self._first)
            positions = Positions(
                tokens=tokens[first + 1 : end + 1], cache_length=first - held.begin, num_logits=1, slot=slot
            )
            feed = HeadFeed(positions=positions, states=session.fuse([part[rows] for part in states]))
        assert feed is not None
        self._first += count
        self._pending -= count
        self._states = [tuple(part[count:] for part in states)] if self._pending else []
        held.tokens = tokens[: self._first + 1].copy()
        return feed


def _permitted(guide: Guide, path: Sequence[int], tokens: Int64, shares: Float32) -> tuple[Int64, Float32]:
    """The tokens that may come, with their shares of what is left when the others cannot."""
    permitted = np.array(guide.permits(path, tokens.tolist()), np.bool_)
    left = max(1.0 - float(shares[~permitted].sum()), float(shares[permitted].sum()))
    return tokens[permitted], shares[permitted] / max(left, _LEAST_LEFT)
