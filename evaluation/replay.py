"""Replay (the command `simulate`): recorded generations replayed against drafters and controllers, without a model.

The target's tokens are known, so what a round accepts is known, too; the latency of its pass comes from a surface. Two
things differ from a run: positions of rejected drafts tell no successors (a trace has those of emitted tokens alone),
and passes take exactly what the surface says. Engines that draft are loaded and do run, with the latencies of their
own surface; so does a draft head, on hidden states that the verifier tells of the recorded tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH
from engines.probes.row_invariance import RowInvariance
from evaluation.replay_clock import ReplayClock
from evaluation.replay_conditions import ReplayConditions
from runtime.acceptance import accept, follow
from runtime.control.control import Control
from runtime.control.controller import Knowledge
from runtime.control.from_options import make_control
from runtime.control.latency import LatencyModel
from runtime.drafters.base import Draft
from runtime.drafters.named import DrafterOption
from runtime.segment import Outcome, Segment
from runtime.traces import TracedGeneration

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Sums over replayed generations.

    `seconds`: of all rounds, by the surface, with `draft_seconds` for drafting: as it was here, but for the passes of
    engines that draft. `plain_seconds`: of plain decoding, by the surface.
    """

    tokens: int
    rounds: int
    drafted: int
    accepted: int
    seconds: float
    draft_seconds: float
    plain_seconds: float

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per round; plain decoding is 1.00."""
        return self.tokens / self.rounds if self.rounds else 1.0

    @property
    def speed_up(self) -> float:
        """Over plain decoding."""
        return self.plain_seconds / self.seconds if self.seconds else 1.0

    def to_json(self) -> dict[str, float]:
        """The command's JSON."""
        return {
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_length": self.acceptance_length,
            "speed_up": self.speed_up,
            "ms_per_round": 1e3 * self.seconds / self.rounds if self.rounds else 0.0,
            "draft_ms_per_round": 1e3 * self.draft_seconds / self.rounds if self.rounds else 0.0,
        }


def replay(
    generation: TracedGeneration,
    control: Control,
    latency: LatencyModel,
    *,
    exact: RowInvariance = RowInvariance(chain=1, widest=MAX_WIDTH, tree=True),  # noqa: B008 - immutable
    clock: ReplayClock | None = None,
    count_drafting: bool = True,
    hidden_states: Sequence[Float32] = (),
) -> Replay:
    """One generation, round by round.

    Args:
        control: fresh for this sequence.
        latency: of this machine or another; they are not corrected.
        exact: which passes are exact: narrower ones are made as wide, wider ones are not made.
        clock: what `control` and the engines that draft for it go by.
        count_drafting: whether the time that drafting takes here is part of a round's. Passes of engines always are;
            with them alone a replay repeats exactly.
        hidden_states: the verifier's at every position but the last, float32 [n, hidden] by layer, for draft heads.
    """
    clock, plain_width = clock or ReplayClock(), exact.chain or 1
    clock.ticks = count_drafting
    tokens, top = generation.tokens, generation.top
    context = np.array(generation.prompt + tokens, np.int64)
    emitted, length = 1, len(generation.prompt) + 1
    successors = np.array(top, np.int64) if top else None
    if hidden_states:
        control.see(context[:length], 0, [states[: length - 1] for states in hidden_states])
    control.begin(context[: length - 1], tokens[0], None if successors is None else successors[:1])
    rounds = drafted = accepted = 0
    seconds = plain = drafting = 0.0
    while emitted < len(tokens):
        cache_length = length - 1
        seconds_by_width = latency.of(cache_length).seconds
        start = clock()
        most = min(len(tokens) - emitted - 1, exact.widest - 1, exact.drafts_before_boundary(cache_length))
        proposal = control.propose(context[:length], most, cache_length)
        took = clock() - start
        draft = proposal.draft
        path = _path(draft, tokens[emitted:])
        count = len(path)
        width = max(1 + len(draft.tokens), plain_width)
        outcome = Outcome(
            segment=Segment(
                tokens=np.zeros(width, np.int64), cache_length=cache_length, num_logits=width, proposal=proposal
            ),
            tokens=context[length : length + count],
            path=path,
            accepted=count - 1,
            seen=None if successors is None else context[length - 1 : length - 1 + count],
            successors=None if successors is None else successors[emitted : emitted + count],
            seconds=seconds_by_width[width - 1],
        )
        start = clock()
        if hidden_states:
            committed = slice(cache_length, cache_length + count)
            control.see(context[: length + count], cache_length, [states[committed] for states in hidden_states])
        control.learn(outcome)
        took += clock() - start
        rounds += 1
        drafted += len(draft.tokens)
        accepted += count - 1
        drafting += took
        seconds += seconds_by_width[width - 1] + took
        plain += sum(latency.of(cache_length + place).seconds[plain_width - 1] for place in range(count))
        emitted += count
        length += count
    return Replay(
        tokens=len(tokens) - 1,
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        seconds=seconds,
        draft_seconds=drafting,
        plain_seconds=plain,
    )


def _path(draft: Draft, following: Sequence[int]) -> tuple[int, ...]:
    """The places of a pass after which the target chooses the tokens that are known to follow, up to the last one."""
    left = list(reversed(following))
    path, _, _ = accept(follow(draft.tokens, draft.parents), lambda place: left.pop(), lambda token: bool(left))
    return path


def simulate(
    generations: Sequence[TracedGeneration],
    conditions: ReplayConditions,
    drafter: DrafterOption,
    *,
    num_draft_tokens: int | None = None,
    count_drafting: bool = True,
    on_generation: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Replay all, one after the other, as one engine would answer them.

    Returns the sums, `mean_speed_up` over prompts, and both by category.
    """
    latency = LatencyModel(conditions.surface_ms, widest=MAX_WIDTH)
    knowledge = Knowledge(LatencyModel(conditions.surface_ms, widest=MAX_WIDTH), clock=conditions.clock)
    replays: list[tuple[str, Replay]] = []
    for generation in generations:
        control = make_control(
            drafter, num_draft_tokens, target=conditions.target, exact=conditions.exact, knowledge=knowledge
        )
        replays.append(
            (
                generation.category,
                replay(
                    generation,
                    control,
                    latency,
                    exact=conditions.exact,
                    clock=conditions.clock,
                    count_drafting=count_drafting,
                    hidden_states=() if conditions.head is None else conditions.head.hidden_states(generation),
                ),
            )
        )
        on_generation()
    categories = dict.fromkeys(category for category, _ in replays)
    return {
        **_summary([one for _, one in replays]),
        "categories": {of: _summary([one for category, one in replays if category == of]) for of in categories},
    }


def total(replays: Sequence[Replay]) -> Replay:
    """The sums."""
    return Replay(
        tokens=sum(one.tokens for one in replays),
        rounds=sum(one.rounds for one in replays),
        drafted=sum(one.drafted for one in replays),
        accepted=sum(one.accepted for one in replays),
        seconds=sum(one.seconds for one in replays),
        draft_seconds=sum(one.draft_seconds for one in replays),
        plain_seconds=sum(one.plain_seconds for one in replays),
    )


def _summary(replays: Sequence[Replay]) -> dict[str, float]:
    speeds = [one.speed_up for one in replays if one.rounds]
    mean = sum(speeds) / len(speeds) if speeds else 1.0
    return {"prompts": len(replays), **total(replays).to_json(), "mean_speed_up": mean}


def halves(generations: Sequence[TracedGeneration]) -> tuple[list[TracedGeneration], list[TracedGeneration]]:
    """Every second generation of each category, and the others: one half to choose constants on, one to check them."""
    counts: dict[str, int] = {}
    parts: tuple[list[TracedGeneration], list[TracedGeneration]] = ([], [])
    for generation in generations:
        place = counts.get(generation.category, 0)
        counts[generation.category] = place + 1
        parts[place % 2].append(generation)
    return parts
