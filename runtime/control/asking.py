"""Whether to ask drafters at all for a pass that sequences share.

Asking takes the host's time while every sequence of the pass waits: on a small model, sixteen sequences' drafts take as
long to prepare as a tenth of the pass. A sequence's drafters are asked while that saves more than it takes, by what the
latest askings brought. Otherwise they are tried from time to time, for a fixed share of what passes take.
"""

from runtime.control.latency import Threshold

# Of a sequence's share of a pass, what trials may take while asking does not pay.
_TRIAL_SHARE = 0.005
# Askings that the means go by: of what they took and saved in all of an engine's sequences, and saved in one.
_EVERYWHERE, _OWN = 64, 8
# Askings of an engine before its means decide.
_FIRST = 16
# A trial that took so many times the mean was interrupted: it counts as this much.
_MOST_RATIO = 4.0
# Where drafts must be so much less likely to pay than when they were last asked for, what was learnt is out of date.
_LOWERED = 0.8


class Asking:
    """What an engine's sequences have in common: means of the seconds that an asking takes and saves."""

    def __init__(self) -> None:
        self.takes = self.saves = 0.0
        self._timed = self._judged = 0

    @property
    def known(self) -> bool:
        """Whether there were enough of them to go by."""
        return min(self._timed, self._judged) >= _FIRST

    def took(self, seconds: float) -> None:
        """An asking took so long."""
        if self._timed:
            seconds = min(seconds, _MOST_RATIO * self.takes)
        self._timed += 1
        self.takes += (seconds - self.takes) / min(self._timed, _EVERYWHERE)

    def saved(self, seconds: float) -> None:
        """It is expected to save so much."""
        self._judged += 1
        self.saves += (seconds - self.saves) / min(self._judged, _EVERYWHERE)


class SequenceAsking:
    """The same for one sequence, which begins as all of them are and with a trial."""

    def __init__(self, everywhere: Asking) -> None:
        self._everywhere = everywhere
        self._saves: float | None = None
        # What trials may take by now, and what drafts had to exceed when they were asked for.
        self._allowance = float("inf")
        self._least = float("inf")
        self._asked = 0

    def asks(self, threshold: Threshold) -> bool:
        """Whether to ask for the next pass."""
        if threshold.least >= 1.0:
            return False
        everywhere = self._everywhere
        self._allowance += _TRIAL_SHARE * threshold.token_seconds
        saves = everywhere.saves if self._saves is None else self._saves
        if (
            everywhere.known
            and saves < everywhere.takes
            and self._allowance < everywhere.takes
            and threshold.least >= _LOWERED * self._least
        ):
            return False
        self._allowance, self._least = 0.0, threshold.least
        return True

    def gained(self, seconds: float) -> None:
        """What the drafts are expected to save that were asked for."""
        before = self._everywhere.saves if self._saves is None else self._saves
        self._everywhere.saved(seconds)
        self._saves = before + (seconds - before) / _OWN

    def took(self, seconds: float) -> None:
        """What asking took; the first time drafters read the prompt, which later ones do not."""
        self._asked += 1
        if self._asked > 1:
            self._everywhere.took(seconds)
