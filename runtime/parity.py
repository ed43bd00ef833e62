"""`verify`: speculation must give the tokens of plain decoding, and of equal length, on the same engine."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quasar.text import Prompt
from runtime.api import Engine, Generation
from runtime.drafters import Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first place where two decodings of a prompt differ; an id is None where one text had ended.

    `logit_gap`: how far the plain token's logit lies above the speculative one's, after the common text.
    """

    prompt: int
    position: int
    plain_id: int | None
    speculative_id: int | None
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What `verify` counted over all prompts; rounds, drafted and accepted are the speculative runs'."""

    prompts: int
    identical: int
    tokens: int
    plain_width: int
    rounds: int
    drafted: int
    accepted: int
    emitted_in_rounds: int
    divergences: tuple[Divergence, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per round, bonus included."""
        return self.emitted_in_rounds / self.rounds if self.rounds else 1.0

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        value = asdict(self)
        del value["emitted_in_rounds"]
        return {**value, "acceptance_length": self.acceptance_length}


def verify(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    drafter: Drafter | str,
    num_draft_tokens: int,
    max_new_tokens: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> Parity:
    """Decode every prompt plainly, token by token, and speculatively, and compare ids and lengths."""
    divergences: list[Divergence] = []
    speculative_runs: list[Generation] = []
    for index, prompt in enumerate(prompts):
        plain = engine.generate(prompt.messages, max_new_tokens=max_new_tokens, drafter="none")
        speculative = engine.generate(
            prompt.messages, max_new_tokens=max_new_tokens, drafter=drafter, num_draft_tokens=num_draft_tokens
        )
        speculative_runs.append(speculative)
        if plain.token_ids != speculative.token_ids:
            divergences.append(_divergence(engine, prompt, index, plain.token_ids, speculative.token_ids))
        on_prompt()
    stats = [run.stats for run in speculative_runs]
    return Parity(
        prompts=len(prompts),
        identical=len(prompts) - len(divergences),
        tokens=sum(one.tokens for one in stats),
        plain_width=engine.plain_width,
        rounds=sum(one.rounds for one in stats),
        drafted=sum(one.drafted for one in stats),
        accepted=sum(one.accepted for one in stats),
        emitted_in_rounds=sum(one.tokens - 1 for one in stats),
        divergences=tuple(divergences),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first place where two different sequences differ; the shorter one's length if it is a prefix."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


def _divergence(
    engine: Engine, prompt: Prompt, index: int, plain: Sequence[int], speculative: Sequence[int]
) -> Divergence:
    place = first_difference(plain, speculative)
    left = plain[place] if place < len(plain) else None
    right = speculative[place] if place < len(speculative) else None
    gap = None
    if left is not None and right is not None:
        context = np.concatenate([engine.encode(prompt.messages), np.asarray(plain[:place], np.int64)])
        logits = engine.logits(context.tolist())
        gap = float(logits[left] - logits[right])
    return Divergence(prompt=index, position=place, plain_id=left, speculative_id=right, logit_gap=gap)
