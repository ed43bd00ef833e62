"""`verify`: speculation must give the tokens of plain decoding, and of equal length, on the same engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np

from quasar.text import Message, Prompt
from runtime.api import Engine
from runtime.events import Generation
from runtime.generation_options import OPTIONS
from runtime.option_keywords import OptionsDict
from runtime.traces import Recorder

Turns = Literal["first", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """The first place where two decodings of a prompt differ; an id is None where one answer had ended.

    `turn` counts from 1. `logit_gap`: how far the plain token's logit lies above the speculative one's, after the
    common tokens.
    """

    prompt: int
    turn: int
    position: int
    plain_id: int | None
    speculative_id: int | None
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """What `verify` counted over all prompts; rounds, drafted, accepted and reused are the speculative runs'.

    `answers`: of all turns. `reused_tokens` of the prompts were in the cache from earlier turns.
    """

    prompts: int
    identical: int
    answers: int
    tokens: int
    plain_width: int
    rounds: int
    drafted: int
    accepted: int
    emitted_in_rounds: int
    reused_tokens: int
    divergences: tuple[FirstDifference, ...]

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
    options: OptionsDict,
    *,
    turns: Turns = "first",
    recorder: Recorder | None = None,
    on_prompt: Callable[[], None] = lambda: None,
) -> Exactness:
    """Decode every prompt plainly, token by token, and speculatively, and compare ids and lengths.

    Args:
        options: of both; the plain one drafts nothing. What is drawn needs a seed.
        turns: "all" goes on with the later turns of a prompt: plainly, each from an empty cache; speculatively, in a
            conversation that keeps it.
        recorder: the speculative answers are written there, with their prompts' categories.
    """
    options = _one_by_one(options)
    divergences: list[FirstDifference] = []
    speculative_runs: list[Generation] = []
    for index, prompt in enumerate(prompts):
        if recorder is not None:
            recorder.category = prompt.category
            options = cast("OptionsDict", {**options, "recorder": recorder})
        for turn, (messages, plain, speculative) in enumerate(_both(engine, prompt, options, turns), start=1):
            speculative_runs.append(speculative)
            if plain.token_ids != speculative.token_ids:
                ids = (plain.token_ids, speculative.token_ids)
                divergences.append(_divergence(engine, messages, (index, turn), *ids, options=options))
                break
        on_prompt()
    stats = [run.stats for run in speculative_runs]
    return Exactness(
        prompts=len(prompts),
        identical=len(prompts) - len(divergences),
        answers=len(speculative_runs),
        tokens=sum(one.tokens for one in stats),
        plain_width=engine.plain_width,
        rounds=sum(one.rounds for one in stats),
        drafted=sum(one.drafted for one in stats),
        accepted=sum(one.accepted for one in stats),
        emitted_in_rounds=sum(one.tokens - 1 for one in stats),
        reused_tokens=sum(one.reused_tokens for one in stats),
        divergences=tuple(divergences),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first place where two different sequences differ; the shorter one's length if it is a prefix."""
    for place, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return place
    return min(len(a), len(b))


def _both(
    engine: Engine, prompt: Prompt, options: OptionsDict, turns: Turns
) -> Iterator[tuple[list[Message], Generation, Generation]]:
    """Turn by turn: the messages, the plain answer to them, and the speculative one."""
    drafting = ("drafter", "num_draft_tokens", "recorder")
    others = {name: value for name, value in options.items() if name not in drafting}
    plainly = cast("OptionsDict", {**others, "drafter": "none"})
    messages = list(prompt.messages)
    if turns == "first":
        yield messages, engine.generate(messages, **plainly), engine.generate(messages, **options)
        return
    with engine.session() as conversation:
        for later in (*prompt.later_turns, None):
            plain, speculative = engine.generate(messages, **plainly), conversation.generate(messages, **options)
            yield messages, plain, speculative
            if later is not None:
                answer = Message(role="assistant", content=plain.text)
                messages = [*messages, answer, Message(role="user", content=later)]


def _one_by_one(options: OptionsDict) -> OptionsDict:
    """The keywords, with those of `options=` among them: a plain run leaves some of them out."""
    base = options.get("options")
    if base is None:
        return options
    given = {one.name: getattr(base, one.name) for one in OPTIONS if getattr(base, one.name) != one.default}
    return cast("OptionsDict", {**given, **{name: value for name, value in options.items() if name != "options"}})


def _is_greedy(options: OptionsDict) -> bool:
    return not options.get("temperature")


def _divergence(
    engine: Engine,
    messages: list[Message],
    where: tuple[int, int],
    plain: Sequence[int],
    speculative: Sequence[int],
    *,
    options: OptionsDict,
) -> FirstDifference:
    place = first_difference(plain, speculative)
    left = plain[place] if place < len(plain) else None
    right = speculative[place] if place < len(speculative) else None
    gap = None
    if _is_greedy(options) and left is not None and right is not None:
        context = np.concatenate([engine.encode(messages, **options), np.asarray(plain[:place], np.int64)])
        logits = engine.logits(context.tolist())
        gap = float(logits[left] - logits[right])
    return FirstDifference(
        prompt=where[0], turn=where[1], position=place, plain_id=left, speculative_id=right, logit_gap=gap
    )
