"""How far the trees of draft heads are grown: as long as a step is expected to raise the tokens per second."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.control.latency import Latencies
from runtime.drafters.base import Int64
from runtime.drafters.draft_head import HeadDrafter

# Before a step was timed: its share of a pass of one position.
_FIRST_STEP = 0.1
# How likely the likeliest token after a node is, before any of this tree was seen.
_FIRST_CHILD = 0.6
# A node that is less likely to be reached is not expanded, nor is one so deep; and so many steps are made at most.
_LEAST_REACHED, _MOST_DEPTH, _MOST_STEPS = 0.02, 10, 12
# Passes in which a head that did not pay is left alone, before it is asked again.
_PATIENCE = 16
# The newest pass's share in what the head is expected to bring.
_NEWEST = 0.1
# Rounds of one sequence are told apart by the tokens that the other drafters promise, in halves, up to this.
_MOST_BUCKET = 10


class Expected(Protocol):
    """What a selection brings and takes."""

    @property
    def rate(self) -> float:
        """Expected tokens per second."""


class HeadGains:
    """What asking the head brought over not asking it: ratios of expected tokens per second, by kind of pass."""

    def __init__(self) -> None:
        self._ratios: dict[Hashable, float] = {}
        self._unasked: dict[Hashable, int] = {}

    def asks(self, kind: Hashable) -> bool:
        """Whether to ask it for a pass of this kind."""
        if self._ratios.get(kind, 1.0) >= 1.0:
            return True
        self._unasked[kind] = self._unasked.get(kind, 0) + 1
        return self._unasked[kind] % _PATIENCE == 0

    def count(self, kind: Hashable, *, with_head: Expected, without: Expected, caught_up: bool) -> None:
        """It was asked for a pass of this kind.

        `caught_up`: its first step made up for passes without it, or for a prompt. What that takes says nothing of a
        head that is asked in every pass, so it is asked in the next one again.
        """
        if caught_up:
            self._unasked[kind] = -1
            return
        ratio = with_head.rate / without.rate
        known = self._ratios.get(kind, ratio)
        self._ratios[kind] = known + _NEWEST * (ratio - known)


def kind_of_round(promised: float) -> Hashable:
    """Passes of one sequence, by the tokens that the other drafters promise."""
    return min(int(2 * promised), _MOST_BUCKET)


def kind_of_pass(num_sequences: int) -> Hashable:
    """Passes that so many sequences share."""
    return "shared", num_sequences.bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sprout:
    """A sequence whose tree may be grown.

    `context` int64 [n]: the sequence so far. `rate` of a guess by its evidence, given that what it follows was right.
    `most`: drafts, at most.
    """

    head: HeadDrafter
    context: Int64
    rate: Callable[[int], float]
    most: int


def grow(sprouts: Sequence[Sprout], latency: Latencies, *, others: float = 0.0) -> float:
    """Grow the trees of sequences that share a pass; the seconds that it is taken to have cost, 0 where none begins.

    Args:
        sprouts: of one head.
        latency: of the pass that verifies, by the number of its drafts.
        others: tokens that the pass brings besides.
    """
    begun = [(one, feed) for one in sprouts if (feed := one.head.begin(one.context)) is not None]
    if not begun:
        return 0.0
    others += len(sprouts) - len(begun)
    sprouts, cache = [one for one, _ in begun], begun[0][0].head.cache
    cache.step([one.head for one in sprouts], [feed for _, feed in begun])
    seconds = np.array(latency.seconds)
    step = _step_seconds(cache.step_seconds, latency)
    spent = step(len(sprouts))
    for _ in range(_MOST_STEPS):
        trees = [_reached(one) for one in sprouts]
        of_all = [sorted(found, reverse=True)[: one.most] for one, found in zip(sprouts, trees, strict=True)]
        likeliest = np.sort(np.concatenate(of_all))[::-1][: len(seconds) - 1]
        expected = others + len(sprouts) + np.concatenate([[0.0], np.cumsum(likeliest)])
        taken = seconds[: len(expected)] + spent
        best = int(np.argmax(expected / taken))
        nodes = _worth_expanding(
            sprouts,
            trees,
            expected=float(expected[best]),
            taken=float(taken[best]),
            step=step,
            further=float(seconds[min(best + 1, len(seconds) - 1)] - seconds[best]),
        )
        growing = [(one, own) for one, own in zip(sprouts, nodes, strict=True) if own]
        if not growing:
            break
        cache.step([one.head for one, _ in growing], [one.head.expand(own) for one, own in growing])
        step = _step_seconds(cache.step_seconds, latency)
        spent += step(sum(len(own) for _, own in growing))
    return spent


def _worth_expanding(
    sprouts: Sequence[Sprout],
    trees: Sequence[Sequence[float]],
    *,
    expected: float,
    taken: float,
    step: Callable[[int], float],
    further: float,
) -> list[list[int]]:
    """The nodes of each tree that are worth expanding in one more step, likeliest first."""
    frontier: list[tuple[float, float, int, int]] = []
    for place, (one, reached) in enumerate(zip(sprouts, trees, strict=True)):
        child, depths = _likeliest_child(one, reached), one.head.tree.depths
        frontier += [
            (reached[node], child, place, node)
            for node in one.head.frontier(reached, one.most)
            if reached[node] >= _LEAST_REACHED and depths[node] < _MOST_DEPTH
        ]
    frontier.sort(key=lambda one: -one[0])
    best, best_rate, gain = 0, expected / taken, 0.0
    for count, (share, child, _, _) in enumerate(frontier, start=1):
        gain += share * child
        rate = (expected + gain) / (taken + step(count) + count * further)
        if rate > best_rate:
            best, best_rate = count, rate
    nodes: list[list[int]] = [[] for _ in sprouts]
    for _, _, place, node in frontier[:best]:
        nodes[place].append(node)
    return nodes


def _step_seconds(known: float, latency: Latencies) -> Callable[[int], float]:
    """Seconds of a step by its positions: wide ones take as much more as the verifier's passes do."""
    first = latency.seconds[0]
    one = known or _FIRST_STEP * first

    def seconds(positions: int) -> float:
        return one * latency.seconds[min(positions, len(latency.seconds)) - 1] / first

    return seconds


def _likeliest_child(one: Sprout, reached: Sequence[float]) -> float:
    """How likely the likeliest token after a node is, given the node: the mean over those that were expanded."""
    tree = one.head.tree
    best = {-1: 0.0} | dict.fromkeys(tree.expanded, 0.0)
    for node, parent in enumerate(tree.parents):
        best[parent] = max(best[parent], reached[node] / (reached[parent] if parent >= 0 else 1.0))
    # One tree is few guesses.
    return (sum(best.values()) + _FIRST_CHILD) / (len(best) + 1)


def _reached(one: Sprout) -> list[float]:
    """How likely each node is to be reached."""
    reached: list[float] = []
    for parent, evidence in zip(one.head.tree.parents, one.head.tree.evidence, strict=True):
        share = one.rate(evidence)
        reached.append(share if parent < 0 else share * reached[parent])
    return reached
