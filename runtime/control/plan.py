"""What the loop and whatever decides about drafts tell each other, every round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.drafters.base import NO_DRAFT, Draft, Int64, ObservingDrafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one round verifies, whose draft it is, and what is expected of it (0: nothing was)."""

    draft: Draft
    drafter: str = ""
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0


NO_PLAN = Plan(draft=NO_DRAFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a plan.

    `tokens` int64 [n]: emitted. `rows`: the rows of the pass that they were chosen behind, 0 the pending token's.
    `fed` int64 [1 + K]: the pending token and the drafts. `successors` int64 [1 + K, k]: the target's likeliest tokens
    behind each, where the engine tells them. `width`: rows of the pass, padding included. `seconds`: without drafting.
    """

    plan: Plan
    tokens: Int64
    rows: tuple[int, ...]
    fed: Int64
    successors: Int64 | None
    cache_length: int
    width: int
    seconds: float


class Control(Protocol):
    """Decides what is drafted; one per text."""

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:
        """The prompt int64 [n] was prefilled, and the text begins with `first`.

        `successors` int64 [1, k]: the likeliest tokens behind the prompt, where the engine tells them.
        """

    def plan(self, context: Int64, most: int, cache_length: int) -> Plan:
        """What to verify behind `context` int64 [n] (a view of a buffer that grows): at most so many drafts."""

    def learn(self, outcome: Outcome) -> None:
        """What came of the last plan."""


class NoControl:
    """Plain decoding."""

    def begin(self, prompt: Int64, first: int, successors: Int64 | None) -> None:
        """As `Control`."""

    def plan(self, context: Int64, most: int, cache_length: int) -> Plan:  # noqa: ARG002 - the form of `Control`
        """No draft."""
        return NO_PLAN

    def learn(self, outcome: Outcome) -> None:
        """As `Control`."""


def tell_prompt(drafters: Sequence[ObservingDrafter], prompt: Int64, successors: Int64 | None) -> None:
    """Let drafters see the likeliest tokens behind the prompt, int64 [1, k], where the engine tells them."""
    if successors is not None:
        for drafter in drafters:
            drafter.observe(prompt[-1:], successors)


def tell(drafters: Sequence[ObservingDrafter], outcome: Outcome) -> None:
    """Let drafters see the rows of a pass: rejected ones first, so that what was accepted counts."""
    if outcome.successors is None or not drafters:
        return
    kept = set(outcome.rows)
    order = [row for row in range(len(outcome.fed)) if row not in kept]
    order += outcome.rows
    tokens, successors = outcome.fed[order], outcome.successors[order]
    for drafter in drafters:
        drafter.observe(tokens, successors)
