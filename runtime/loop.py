"""The loop: draft K tokens ▸ verify [pending, d1..dK] ▸ accept the longest matching prefix ▸ commit ▸ emit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.control.control import Control
from runtime.sampling.logprobs import TokenLogprob
from runtime.segment import NO_PROPOSAL, Outcome, Proposal
from runtime.sequence import Sequence
from runtime.verifier import Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step's outcome: tokens emitted, how many were drafted and accepted, and its seconds. Prefill drafts nothing.

    `reused`: positions of the prompt that the prefill found in the cache. `seconds` covers the whole step, of which
    `draft_seconds` went into drafting and `sample_seconds` into choosing tokens from logits. A step that was
    interrupted emits nothing.

    `drafter`: whose draft it was. `expected_tokens`, `expected_seconds`: what the controller expected of the step when
    it chose; 0 where nothing was expected.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    seconds: float
    draft_seconds: float
    finish_reason: str | None
    stopped_by: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    sample_seconds: float = 0.0
    reused: int = 0
    drafter: str = ""
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0


def decode(
    sequence: Sequence,
    verifier: Verifier,
    control: Control,
    interrupted: Callable[[], str | None] = lambda: None,
) -> Iterator[Round]:
    """Generate; the first `Round` is the prefill's, with one token.

    Args:
        control: what is drafted.
        interrupted: asked before every pass; a reason ends the sequence, and stays.
    """
    prompt = sequence.tokens
    start = time.perf_counter()
    reused = sequence.reuse() if interrupted() is None else 0
    outcome = None
    while (outcome is None or not len(outcome.tokens)) and interrupted() is None:
        outcome = _pass(sequence, verifier, NO_PROPOSAL)
    if outcome is None or not len(outcome.tokens):
        sequence.end(interrupted())
        yield _round(sequence, None, start, reused=reused)
        return
    control.begin(prompt, int(outcome.tokens[0]), outcome.successors)
    yield _round(sequence, outcome, start, reused=reused)
    while not sequence.finished:
        start = time.perf_counter()
        if interrupted() is not None:
            sequence.end(interrupted())
            yield _round(sequence, None, start)
            return
        proposal = control.propose(sequence.tokens, sequence.most_drafts, sequence.cache_length)
        draft_seconds = time.perf_counter() - start
        outcome = _pass(sequence, verifier, proposal)
        outcome = replace(outcome, seconds=time.perf_counter() - start - draft_seconds)
        control.learn(outcome)
        yield _round(sequence, outcome, start, draft_seconds=draft_seconds)


def _pass(sequence: Sequence, verifier: Verifier, proposal: Proposal) -> Outcome:
    """Verify, accept, commit."""
    segment = sequence.next_pass(proposal)
    [targets] = verifier.run([segment])
    outcome = sequence.absorb(segment, targets)
    verifier.keep_path(segment, outcome.path)
    return outcome


def _round(
    sequence: Sequence, outcome: Outcome | None, start: float, *, draft_seconds: float = 0.0, reused: int = 0
) -> Round:
    """What is emitted; nothing by a step that was interrupted (`outcome` None)."""
    cut = sequence.cut
    if outcome is None:
        return Round(
            tokens=(),
            drafted=0,
            accepted=0,
            seconds=time.perf_counter() - start,
            draft_seconds=0.0,
            finish_reason=cut.finish_reason,
            reused=reused,
        )
    proposal = outcome.segment.proposal
    return Round(
        tokens=tuple(outcome.tokens.tolist()),
        drafted=len(proposal.draft.tokens),
        accepted=outcome.accepted,
        seconds=time.perf_counter() - start,
        draft_seconds=draft_seconds,
        finish_reason=cut.finish_reason,
        stopped_by=cut.stopped_by,
        logprobs=outcome.logprobs,
        sample_seconds=outcome.sample_seconds,
        reused=reused,
        drafter=proposal.drafter,
        expected_tokens=proposal.expected_tokens,
        expected_seconds=proposal.expected_seconds,
    )
