"""One sequence's part of a pass: what is proposed for it, what is fed, what the target says, what came of it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.drafters.base import NO_DRAFT, Draft
from runtime.sampling.logprobs import TokenLogprob

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The draft that a round verifies, whose it is, and what is expected of the round (0: nothing was).

    `sources`: the drafter of each of the draft's tokens; of several that proposed it, the first.
    """

    draft: Draft
    drafter: str = ""
    sources: tuple[str, ...] = ()
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0


NO_PROPOSAL = Proposal(draft=NO_DRAFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens of one sequence in one pass.

    `tokens` int64 [T]: a chunk of the prompt; or the pending token, the drafts of `proposal`, and padding. They take
    the cache positions of `slot` from `cache_length` on. `parents` int64 [T]: of a tree (engines.tree); None means a
    chain.

    The target's token is wanted after each of the last `num_logits` positions: chosen in the graph, or with
    `wants_logits` from their logits.
    """

    tokens: Int64
    cache_length: int
    num_logits: int
    wants_logits: bool = False
    parents: Int64 | None = None
    proposal: Proposal = NO_PROPOSAL
    slot: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the target says of a segment. Arrays are views that the next pass overwrites.

    `next_tokens` int64 [num_logits], or `logits` float32 [num_logits, V] where those were wanted. `successors`
    int64 [num_logits, k]: the likeliest tokens after each position, where the engine tells them. `hidden_states`
    float32 [T, hidden], by layer or fused: of every position, where a draft head reads them.
    """

    next_tokens: Int64 | None = None
    logits: Float32 | None = None
    successors: Int64 | None = None
    hidden_states: tuple[Float32, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pass brought a sequence.

    `tokens` int64 [n]: emitted, accepted drafts first. `path`: the place in the segment, counted from the first
    position that has a target, after which each of them was chosen; 0 is the pending token's. `accepted`: how many of
    the tokens are drafts. `logprobs`: of the tokens, where they were asked for.

    `seen` int64 [m] and `successors` int64 [m, k]: tokens that were fed, and the target's likeliest tokens after each;
    those on the path come last. None where the engine does not tell them.

    `seconds`: the pass and choosing from its logits, without drafting; 0 where other sequences shared the pass.
    `sample_seconds`: choosing alone.
    """

    segment: Segment
    tokens: Int64
    path: tuple[int, ...] = ()
    accepted: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    seen: Int64 | None = None
    successors: Int64 | None = None
    seconds: float = 0.0
    sample_seconds: float = 0.0


def seen_tokens(segment: Segment, successors: Int64 | None, path: tuple[int, ...]) -> tuple[Int64 | None, Int64 | None]:
    """`Outcome.seen` and `Outcome.successors` of a pass, from its `Targets.successors`.

    What is on the path comes last, so that it counts where a drafter keeps one entry per token. Padding is left out.
    """
    if successors is None:
        return None, None
    tokens = segment.tokens[len(segment.tokens) - segment.num_logits :]
    if not len(segment.proposal.draft.tokens):
        return tokens[:1].copy(), successors[:1].copy()
    kept = set(path)
    order = [place for place in range(1 + len(segment.proposal.draft.tokens)) if place not in kept]
    order += path
    return tokens[order], successors[order]
