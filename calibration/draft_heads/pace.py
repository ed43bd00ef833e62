"""How far a training has come, by amount or by the clock, and the learning rate there."""

import math
from dataclasses import dataclass

# The rate rises over the first part, and falls as a cosine to a share of its peak.
_WARM_UP = 0.04
_LAST = 0.03
# A training on little text ends before its time: more passes over it would learn it by heart.
MOST_EPOCHS = 6


@dataclass(slots=True, kw_only=True)
class Pace:
    """`seconds`: of the whole training. `most_updates`: after so many it ends; the time may end it before.

    Where the time ends it, each update advances `progress` by its share of what can still be made in what is left.
    `spent`, `updates`: so far.
    """

    seconds: float
    most_updates: int
    progress: float = 0.0
    spent: float = 0.0
    updates: int = 0

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.updates >= self.most_updates or self.progress >= 1 - 1e-9

    def advance(self, seconds: float) -> None:
        """An update was made that took so long."""
        self.spent += seconds
        self.updates += 1
        left = float(self.most_updates - self.updates)
        if self.seconds < math.inf:
            left = min(left, (self.seconds - self.spent) / (self.spent / self.updates))
        self.progress += (1 - self.progress) / (max(left, 0) + 1)

    def rate(self, peak: float) -> float:
        """The learning rate of the next update."""
        if self.progress < _WARM_UP:
            return peak * (self.progress / _WARM_UP * 0.9 + 0.1)
        turned = (self.progress - _WARM_UP) / (1 - _WARM_UP)
        return peak * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * turned)))
