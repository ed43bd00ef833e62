"""What decides about drafts, every round, and what it is told."""

from collections.abc import Sequence
from typing import Protocol

from runtime.control.candidates import Prepared
from runtime.control.latency import Threshold
from runtime.drafters.base import Float32, Int64, ObservingDrafter
from runtime.segment import NO_PROPOSAL, Outcome, Proposal


class Control(Protocol):
    """Decides what is drafted; one per sequence."""

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:
        """The prompt int64 [n] was prefilled, and the answer begins with `first`.

        `successors` int64 [1, k]: the likeliest tokens after the prompt, where the engine tells them.
        """

    def propose(self, context: Int64, most: int, cache_length: int) -> Proposal:
        """What to verify after `context` int64 [n] (a view of a buffer that grows): at most so many drafts."""

    def asks(self, threshold: Threshold) -> bool:
        """Whether drafts are worth preparing for the next pass that sequences share; called once for each."""

    def prepare(self, context: Int64, most: int, cache_length: int) -> Prepared | None:
        """As `propose`, for a pass that sequences share: candidates, of which `settle` is told those to verify.

        None: this control proposes on its own.
        """

    def settle(self, chosen: Sequence[int], *, tokens: float, seconds: float, gain: float) -> Proposal:
        """The proposal of the candidates that were chosen; what the pass is expected to bring and take.

        `gain`: seconds that they are expected to save (`JointSelection.gains`).
        """

    def learn(self, outcome: Outcome) -> None:
        """What came of the last proposal."""

    def see(self, tokens: Int64, first: int, hidden_states: Sequence[Float32]) -> None:
        """Positions from `first` on were committed, with hidden states float32 [n, hidden] by layer.

        `tokens`: the sequence so far, int64 [first + n or more]. Only on engines with a draft head.
        """


class AloneControl:
    """A control that proposes on its own, whatever else is in the pass."""

    def asks(self, threshold: Threshold) -> bool:  # noqa: ARG002 - the form of `Control`
        """As `Control`."""
        return True

    def prepare(self, context: Int64, most: int, cache_length: int) -> None:
        """As `Control`."""

    def settle(self, chosen: Sequence[int], *, tokens: float, seconds: float, gain: float) -> Proposal:  # noqa: ARG002 - the form of `Control`
        """As `Control`; nothing was left open."""
        return NO_PROPOSAL

    def see(self, tokens: Int64, first: int, hidden_states: Sequence[Float32]) -> None:
        """As `Control`; it is nothing to most."""


class NoControl(AloneControl):
    """Plain decoding."""

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:
        """As `Control`."""

    def propose(self, context: Int64, most: int, cache_length: int) -> Proposal:  # noqa: ARG002 - the form of `Control`
        """No draft."""
        return NO_PROPOSAL

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""


def tell_prompt(drafters: Sequence[ObservingDrafter], prompt: Int64, successors: Int64 | None) -> None:
    """Let drafters see the likeliest tokens after the prompt, int64 [1, k], where the engine tells them."""
    if successors is not None:
        for drafter in drafters:
            drafter.observe(prompt[-1:], successors)


def tell(drafters: Sequence[ObservingDrafter], outcome: Outcome) -> None:
    """Let drafters see what the target says after every token of a pass."""
    if outcome.seen is not None and outcome.successors is not None:
        for drafter in drafters:
            drafter.observe(outcome.seen, outcome.successors)
