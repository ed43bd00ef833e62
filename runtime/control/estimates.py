"""How often guesses are right: counted by what they rest on, over an engine's sequences and within one."""

from collections.abc import Callable, Hashable

# Guesses that what was believed before counts for. Chosen with `evaluation simulate` (docs/drafters.md, "Constants").
_PRIOR_WEIGHT = 8.0
# Guesses that the other sequences' rate counts for beside a sequence's own.
_OTHERS_WEIGHT = 10.0
# At so many guesses, all earlier ones count half: the rate follows what is asked of the engine.
_MOST_WEIGHT = 400.0
# What is left of the guesses that were seen, after a round that made none: a drafter that did not pay is tried again.
_FADING = 0.995

Prior = Callable[[], float]


class Estimates:
    """Acceptance rates over all sequences of an engine: numbers alone, nothing of what they say.

    A `key` says what a guess rests on; `prior()` is what is believed of such guesses before there were any.
    """

    def __init__(self) -> None:
        # Key → guesses that were right, and all; the prior's among them.
        self._counts: dict[Hashable, list[float]] = {}

    def rate(self, key: Hashable, prior: Prior) -> float:
        """The share of such guesses that were right."""
        counts = self._known(key, prior)
        return counts[0] / counts[1]

    def count(self, key: Hashable, prior: Prior, *, right: bool) -> None:
        """One more guess."""
        counts = self._known(key, prior)
        if counts[1] >= _MOST_WEIGHT:
            counts[0] /= 2
            counts[1] /= 2
        counts[0] += right
        counts[1] += 1

    def fade(self, key: Hashable, prior: Prior) -> None:
        """A round in which no such guess was made: what was seen counts a little less beside the prior."""
        counts = self._known(key, prior)
        counts[0] = prior() * _PRIOR_WEIGHT * (1 - _FADING) + counts[0] * _FADING
        counts[1] = _PRIOR_WEIGHT * (1 - _FADING) + counts[1] * _FADING

    def _known(self, key: Hashable, prior: Prior) -> list[float]:
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [prior() * _PRIOR_WEIGHT, _PRIOR_WEIGHT]
        return counts


class SequenceEstimates:
    """The rates within one sequence, which begin as those of all."""

    def __init__(self, everywhere: Estimates) -> None:
        self._everywhere = everywhere
        self._counts: dict[Hashable, list[int]] = {}

    def rate(self, key: Hashable, prior: Prior) -> float:
        """As `Estimates.rate`."""
        everywhere = self._everywhere.rate(key, prior)
        counts = self._counts.get(key)
        if counts is None:
            return everywhere
        return (counts[0] + _OTHERS_WEIGHT * everywhere) / (counts[1] + _OTHERS_WEIGHT)

    def count(self, key: Hashable, prior: Prior, *, right: bool) -> None:
        """One more guess, here and everywhere."""
        self._everywhere.count(key, prior, right=right)
        counts = self._counts.setdefault(key, [0, 0])
        counts[0] += right
        counts[1] += 1
