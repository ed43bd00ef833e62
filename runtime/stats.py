"""What one generation took and what speculation brought it."""

from dataclasses import asdict, dataclass
from typing import Any

from runtime.draft_sources import SourceCount, total
from runtime.drafters.prediction import Prediction
from runtime.loop import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """Rounds with drafts of one drafter ("" for none) and length: what they brought and took, and what was expected.

    Expected figures cover the `expected_rounds` that a controller chose; a fixed drafter expects nothing.
    """

    drafter: str
    num_draft_tokens: int
    rounds: int
    tokens: int
    seconds: float
    expected_rounds: int
    expected_tokens: float
    expected_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts and seconds of one generation.

    `tokens` emitted in all; the first comes from prefill, the others from `rounds` verify passes. `reused_tokens` of
    the prompt were in the cache. `draft_seconds` and `sample_seconds` (choosing tokens from logits) are parts of
    `decode_seconds`; `wait_seconds`, for other sequences on the engine, are part of nothing. `seed`: of drawn tokens.
    `finish_reason` is "" where the stream was closed, or failed, before its end. `drafts`: the rounds by drafter and
    length, the most frequent first. `sources`: drafts verified and accepted, by the drafter that proposed them.
    """

    prompt_tokens: int
    reused_tokens: int
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    prefill_seconds: float
    decode_seconds: float
    draft_seconds: float
    sample_seconds: float
    wait_seconds: float
    finish_reason: str
    seed: int | None = None
    drafts: tuple[DraftStats, ...] = ()
    sources: tuple[SourceCount, ...] = ()

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per round, bonus included; plain decoding is 1.00."""
        return (self.tokens - 1) / self.rounds if self.rounds else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rounds per second of decoding; prefill and its token stand apart."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def accepted_prediction_tokens(self) -> int:
        """Drafts from the option `prediction` that were accepted."""
        return sum(one.accepted for one in self.sources if one.drafter == Prediction.name)

    @property
    def rejected_prediction_tokens(self) -> int:
        """Drafts from the option `prediction` that were verified and not accepted."""
        return sum(one.drafted - one.accepted for one in self.sources if one.drafter == Prediction.name)

    def to_json(self) -> dict[str, Any]:
        """Every field and every derived figure."""
        return {
            **asdict(self),
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_second": self.tokens_per_second,
            "accepted_prediction_tokens": self.accepted_prediction_tokens,
            "rejected_prediction_tokens": self.rejected_prediction_tokens,
        }


class StatsBuilder:
    """Sums the steps of one generation: the prefill, then rounds."""

    def __init__(self, prompt_tokens: int, seed: int | None = None) -> None:
        self._prompt_tokens, self._seed = prompt_tokens, seed
        self._steps: list[Round] = []
        self.wait_seconds = 0.0

    def add(self, step: Round) -> None:
        """Another step."""
        self._steps.append(step)

    def stats(self) -> Stats:
        """Counts and seconds so far."""
        prefill, rounds = self._steps[:1], [step for step in self._steps[1:] if step.tokens]
        return Stats(
            prompt_tokens=self._prompt_tokens,
            reused_tokens=sum(step.reused for step in prefill),
            tokens=sum(len(step.tokens) for step in self._steps),
            rounds=len(rounds),
            drafted=sum(step.drafted for step in rounds),
            accepted=sum(step.accepted for step in rounds),
            prefill_seconds=sum(step.seconds for step in prefill),
            decode_seconds=sum(step.seconds for step in rounds),
            draft_seconds=sum(step.draft_seconds for step in rounds),
            sample_seconds=sum(step.sample_seconds for step in rounds),
            wait_seconds=self.wait_seconds,
            finish_reason=(self._steps[-1].finish_reason or "") if self._steps else "",
            seed=self._seed,
            drafts=_by_draft(rounds),
            sources=total(count for step in rounds for count in step.sources),
        )


def _by_draft(rounds: list[Round]) -> tuple[DraftStats, ...]:
    kinds: dict[tuple[str, int], list[Round]] = {}
    for step in rounds:
        kinds.setdefault((step.drafter, step.drafted), []).append(step)
    found = [
        DraftStats(
            drafter=drafter,
            num_draft_tokens=drafted,
            rounds=len(steps),
            tokens=sum(len(step.tokens) for step in steps),
            seconds=sum(step.seconds for step in steps),
            expected_rounds=sum(step.expected_seconds > 0 for step in steps),
            expected_tokens=sum(step.expected_tokens for step in steps),
            expected_seconds=sum(step.expected_seconds for step in steps),
        )
        for (drafter, drafted), steps in kinds.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.rounds))
