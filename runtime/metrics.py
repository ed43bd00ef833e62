"""What an engine's scheduler has done, and what it is doing: counts for dashboards."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.loop import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Counts since the load, and how things stand now.

    Attributes:
        running, waiting: requests that were in a pass and go on, and those that were in none yet.
        swapped_out: sequences whose positions lie outside of the cache.
        slots, slots_used: of the cache, and those that hold a sequence.
        positions, positions_used: of the cache, and those that hold a sequence's tokens.
        passes: made so far.
        sequences_per_pass: sequences of a pass → how many passes had so many.
        prompt_tokens, drafted_tokens, accepted_tokens, emitted_tokens: fed for prompts, fed as drafts, accepted drafts,
            and emitted.
        reused_tokens: of prompts, that were in the cache.
        pass_seconds, host_seconds: spent in passes, and around them: composing, drafting, choosing tokens.
    """

    running: int
    waiting: int
    swapped_out: int
    slots: int
    slots_used: int
    positions: int
    positions_used: int
    passes: int
    sequences_per_pass: Mapping[int, int]
    prompt_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    emitted_tokens: int
    reused_tokens: int
    pass_seconds: float
    host_seconds: float

    def since(self, before: "Metrics") -> "Counts":
        """What happened between two looks."""
        widths = {
            width: count - before.sequences_per_pass.get(width, 0)
            for width, count in self.sequences_per_pass.items()
            if count > before.sequences_per_pass.get(width, 0)
        }
        return Counts(
            passes=self.passes - before.passes,
            sequences_per_pass=widths,
            prompt_tokens=self.prompt_tokens - before.prompt_tokens,
            emitted_tokens=self.emitted_tokens - before.emitted_tokens,
            pass_seconds=self.pass_seconds - before.pass_seconds,
            host_seconds=self.host_seconds - before.host_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What happened between two looks at an engine's metrics; fields as in `Metrics`."""

    passes: int
    sequences_per_pass: Mapping[int, int]
    prompt_tokens: int
    emitted_tokens: int
    pass_seconds: float
    host_seconds: float


@dataclass(slots=True)
class Tally:
    """The counts of `Metrics`, while they grow."""

    passes: int = 0
    sequences_per_pass: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    emitted_tokens: int = 0
    reused_tokens: int = 0
    pass_seconds: float = 0.0
    host_seconds: float = 0.0

    def count_pass(self, sequences: int, seconds: float) -> None:
        """A pass was made."""
        self.passes += 1
        self.sequences_per_pass[sequences] += 1
        self.pass_seconds += seconds

    def count_round(self, step: Round) -> None:
        """What it brought a sequence."""
        self.drafted_tokens += step.drafted
        self.accepted_tokens += step.accepted
        self.emitted_tokens += len(step.tokens)
        self.reused_tokens += step.reused
