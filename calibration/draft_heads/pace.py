"""How far a training has come, by amount or by the clock: the learning rate there, and how far the head is unrolled."""

import math
from dataclasses import dataclass

# The rate rises over the first part, and falls as a cosine to a share of its peak.
_WARM_UP = 0.03
_LAST = 0.03
# A training on little text ends before its time: more passes over it would learn it by heart.
MOST_EPOCHS = 8
# Until a head knows something, its own hidden states teach little: from which progress on it is unrolled once more.
# Updates of one step take about a quarter of those of four.
_FURTHER_STEPS = (0.3, 0.45, 0.6)


@dataclass(slots=True, kw_only=True)
class Pace:
    """`seconds`: of the whole training. `most_updates`: after so many it ends; the time may end it before.

    `spent`, `updates`: so far.
    """

    seconds: float
    most_updates: int
    spent: float = 0.0
    updates: int = 0

    @property
    def progress(self) -> float:
        """0 to 1."""
        return min(1.0, max(self.spent / self.seconds, self.updates / self.most_updates))

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.progress >= 1

    def advance(self, seconds: float) -> None:
        """An update was made that took so long."""
        self.spent += seconds
        self.updates += 1

    def steps(self, most: int) -> int:
        """How many steps the next update unrolls."""
        return min(most, 1 + sum(self.progress >= begin for begin in _FURTHER_STEPS))

    def rate(self, peak: float) -> float:
        """The learning rate of the next update."""
        if self.progress < _WARM_UP:
            return peak * (self.progress / _WARM_UP * 0.9 + 0.1)
        turned = (self.progress - _WARM_UP) / (1 - _WARM_UP)
        return peak * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * turned)))
