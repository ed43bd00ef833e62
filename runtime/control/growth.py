"""How far a draft head's tree is grown in a round: as long as a step is expected to raise the tokens per second."""

from collections.abc import Callable, Sequence

import numpy as np

from runtime.control.candidates import Selection
from runtime.control.latency import Latencies
from runtime.drafters.base import GrowingDrafter, Int64

# Before a step was timed: its share of a pass of one position.
_FIRST_STEP = 0.1
# How likely the likeliest token after a node is, before any of this tree was seen.
_FIRST_CHILD = 0.6
# A node that is less likely to be reached is not expanded, nor is one so deep, nor more than so many in a round.
_LEAST_REACHED, _MOST_DEPTH, _MOST_STEPS = 0.02, 10, 12
# Rounds in which a head that did not pay is left alone, before it is asked again.
_PATIENCE = 16
# The newest round's share in what the head is expected to bring.
_NEWEST = 0.1
# Rounds are told apart by the tokens that the other drafters promise, in halves, up to this.
_MOST_BUCKET = 10


class HeadGains:
    """What asking the head brought over not asking it, of an engine's rounds: ratios of expected tokens per second."""

    def __init__(self) -> None:
        self._ratios: dict[int, float] = {}
        self._unasked: dict[int, int] = {}

    def asks(self, promised: float) -> bool:
        """Whether to ask it, where the others' drafts promise so many tokens."""
        bucket = _bucket(promised)
        if self._ratios.get(bucket, 1.0) >= 1.0:
            return True
        self._unasked[bucket] = self._unasked.get(bucket, 0) + 1
        return self._unasked[bucket] % _PATIENCE == 0

    def count(self, promised: float, ratio: float) -> None:
        """It was asked, and tokens per second became `ratio` times those without."""
        bucket = _bucket(promised)
        known = self._ratios.get(bucket, ratio)
        self._ratios[bucket] = known + _NEWEST * (ratio - known)


def grow(
    head: GrowingDrafter,
    context: Int64,
    rate: Callable[[int], float],
    latency: Latencies,
    most: int,
) -> float:
    """Grow a round's tree; the seconds that it is taken to have cost, 0 where the head knows nothing of the sequence.

    Args:
        rate: of a guess by its evidence, given that what it follows was right.
        latency: of the pass that verifies, by the number of drafts.
        most: drafts that it may hold.
    """
    if not head.start(context):
        return 0.0
    seconds = np.array(latency.seconds[: most + 1])
    step = head.step_seconds or _FIRST_STEP * float(seconds[0])
    spent = step
    for _ in range(_MOST_STEPS):
        reached = _reached(head, rate)
        likeliest = np.sort(np.array(reached))[::-1][:most]
        expected = np.concatenate([[1.0], 1.0 + np.cumsum(likeliest)])
        taken = seconds[: len(expected)] + spent
        best = int(np.argmax(expected / taken))
        nodes = [
            node
            for node in head.frontier(reached, most)
            if reached[node] >= _LEAST_REACHED and head.tree.depths[node] < _MOST_DEPTH
        ]
        further = float(seconds[min(best + 1, len(seconds) - 1)] - seconds[best])
        count = _best_count(
            [reached[node] for node in nodes],
            child=_likeliest_child(head, reached),
            expected=float(expected[best]),
            taken=float(taken[best]),
            step=step,
            further=further,
        )
        if not count:
            break
        head.grow(nodes[:count])
        step = head.step_seconds or step
        spent += step
    return spent


def _best_count(
    reached: Sequence[float], *, child: float, expected: float, taken: float, step: float, further: float
) -> int:
    """How many of the nodes, likeliest first, are worth expanding in one more step; 0 where none is."""
    best, best_rate = 0, expected / taken
    for count in range(1, len(reached) + 1):
        rate = (expected + child * sum(reached[:count])) / (taken + step + count * further)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def _likeliest_child(head: GrowingDrafter, reached: Sequence[float]) -> float:
    """How likely the likeliest token after a node is, given the node: the mean over those that were expanded."""
    tree = head.tree
    best = {-1: 0.0} | dict.fromkeys(tree.expanded, 0.0)
    for node, parent in enumerate(tree.parents):
        best[parent] = max(best[parent], reached[node] / (reached[parent] if parent >= 0 else 1.0))
    seen = list(best.values())
    # One tree is few guesses.
    return (sum(seen) + _FIRST_CHILD) / (len(seen) + 1)


def _reached(head: GrowingDrafter, rate: Callable[[int], float]) -> list[float]:
    reached: list[float] = []
    for parent, evidence in zip(head.tree.parents, head.tree.evidence, strict=True):
        share = rate(evidence)
        reached.append(share if parent < 0 else share * reached[parent])
    return reached


def ratio_of(selection: Selection, plain: Selection) -> float:
    """Expected tokens per second of one selection over another's."""
    return selection.tokens / selection.seconds / (plain.tokens / plain.seconds)


def _bucket(promised: float) -> int:
    return min(int(2 * promised), _MOST_BUCKET)
