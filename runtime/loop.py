"""The loop: draft K tokens ▸ verify [pending, d1..dK] ▸ accept the longest matching prefix ▸ commit ▸ emit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH, Contract
from engines.probes.row_invariance import RowInvariance
from quasar.errors import ContextLimitError, GenerationError
from runtime.acceptance import follow, follow_nothing
from runtime.control.plan import NO_PLAN, Control, Outcome
from runtime.drafters.base import Draft
from runtime.kv_cache import KVCache
from runtime.sampling.chooser import Choice, GoesOn, Pass, TokenChooser, VerifierSession
from runtime.sampling.logprobs import TokenLogprob
from runtime.stopping import Cut, StopRules

Int64 = NDArray[np.int64]
_NOTHING = Choice(tokens=np.empty(0, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step's outcome: tokens emitted, how many were drafted and kept, and its seconds. Prefill drafts nothing.

    `reused`: rows of the prompt that the prefill found in the cache. `seconds` covers the whole step, of which
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


def check_prompt(prompt: Int64, contract: Contract) -> None:
    """Raise if the prompt is empty, leaves no room for a new token, or holds an id outside the vocabulary."""
    if not len(prompt):
        raise GenerationError("the prompt is empty; at least one token was expected")
    if len(prompt) >= contract.max_length:
        raise ContextLimitError(
            f"the prompt has {len(prompt)} tokens and this engine holds {contract.max_length}, new tokens included: "
            "shorten the prompt or build with a larger --max-length"
        )
    if prompt.min() < 0 or prompt.max() >= contract.vocab_size:
        raise GenerationError(f"the prompt holds a token id outside the vocabulary of {contract.vocab_size}")


def decode(
    chooser: TokenChooser,
    prompt: Int64,
    stop: StopRules,
    *,
    session: VerifierSession,
    cache: KVCache,
    control: Control,
    exact: RowInvariance = RowInvariance(chain=1, widest=MAX_WIDTH),  # noqa: B008 - immutable
    interrupted: Callable[[], str | None] = lambda: None,
) -> Iterator[Round]:
    """Generate from `prompt` int64 [n]; the first `Round` is the prefill's, with one token.

    Args:
        chooser: runs passes and chooses their tokens.
        session: what the chooser runs them on.
        cache: rows of an earlier text; what serves this prompt is kept.
        control: what is drafted.
        exact: which passes are exact on this machine; narrower ones are padded, wider ones are not made.
        interrupted: asked before every pass; a reason ends the text, and stays.
    """
    contract = session.contract
    # The last token needs no row of its own, and the cache may end the text before max_new_tokens does.
    stop.limit(contract.max_length - len(prompt))
    context = np.empty(len(prompt) + stop.left + MAX_WIDTH, np.int64)
    context[: len(prompt)] = prompt
    length = len(prompt)

    cut = Cut()

    def goes_on(token: int) -> bool:
        nonlocal cut
        cut = stop.take(token)
        return cut.finish_reason is None

    start = time.perf_counter()
    reused = 0
    draft_seconds = 0.0
    accepted = 0
    plan = NO_PLAN
    choice = None
    if interrupted() is None:
        reused = cache.reusable(prompt, decoded_rows=exact.prefill)
        cache.truncate(reused)
        choice = _prefill(chooser, context, length, cache, contract.prefill_chunk, interrupted, goes_on)
        if choice is not None:
            control.begin(prompt, int(choice.tokens[0]), _successors(session, 1))
    while True:
        if choice is None:
            stop.end()
            cut, choice = Cut(finish_reason=interrupted()), _NOTHING
        emitted = choice.tokens
        length += len(emitted)
        yield Round(
            tokens=tuple(emitted.tolist()),
            drafted=len(plan.draft.tokens),
            accepted=accepted,
            seconds=time.perf_counter() - start,
            draft_seconds=draft_seconds,
            finish_reason=cut.finish_reason,
            stopped_by=cut.stopped_by,
            logprobs=choice.logprobs,
            sample_seconds=choice.seconds,
            reused=reused,
            drafter=plan.drafter,
            expected_tokens=plan.expected_tokens,
            expected_seconds=plan.expected_seconds,
        )
        if cut.finish_reason is not None:
            return
        start = time.perf_counter()
        reused, accepted, draft_seconds, plan = 0, 0, 0.0, NO_PLAN
        if interrupted() is not None:
            choice = None
            continue
        # One row for the pending token; a draft whose row would not fit, or whose token would be cut, is not asked for.
        wanted = min(stop.left - 1, cache.room - 1, exact.widest - 1, exact.drafts_before_boundary(cache.length))
        plan = control.plan(context[:length], wanted, cache.length)
        draft = plan.draft
        _check(draft, contract)
        draft_seconds = time.perf_counter() - start
        step = _round(draft, context, length, cache.length, exact.chain or 1)
        choice = chooser.choose(step, goes_on)
        # The last token is the target's own, unless the text ended with a draft.
        accepted = len(choice.rows) - (step.follow(choice.rows[-1], int(choice.tokens[-1])) is None)
        # The pending token and the drafts before the last token, which has no row of its own yet.
        rows = np.array(choice.rows, np.int64)
        if step.parents is not None:
            session.compact(cache.length, rows)
        cache.commit(step.fed[rows])
        control.learn(
            Outcome(
                plan=plan,
                tokens=choice.tokens,
                rows=choice.rows,
                fed=step.fed[: len(draft.tokens) + 1],
                successors=_successors(session, len(draft.tokens) + 1),
                cache_length=step.cache_length,
                width=len(step.fed),
                seconds=time.perf_counter() - start - draft_seconds,
            )
        )


def _round(draft: Draft, context: Int64, length: int, cache_length: int, plain_width: int) -> Pass:
    """The pending token and its drafts, padded to the width of plain decoding."""
    count = 1 + len(draft.tokens)
    fed = np.empty(max(count, plain_width), np.int64)
    fed[0] = context[length - 1]
    fed[1:count] = draft.tokens
    fed[count:] = fed[count - 1]
    parents = None
    if draft.parents is not None:
        parents = np.arange(-1, len(fed) - 1, dtype=np.int64)
        parents[1:count] = draft.parents + 1
    return Pass(
        fed=fed,
        cache_length=cache_length,
        num_rows=len(fed),
        text=context,
        length=length,
        follow=follow(draft.tokens, draft.parents),
        parents=parents,
    )


def _prefill(
    chooser: TokenChooser,
    context: Int64,
    length: int,
    cache: KVCache,
    chunk: int,
    interrupted: Callable[[], str | None],
    goes_on: GoesOn,
) -> Choice | None:
    """Feed the prompt behind the rows that are there, cut at fixed multiples of the engine's chunk.

    `context`: the prompt in its first `length` places. Returns the first new token, or None if it was interrupted.
    """
    choice = None
    for begin in range(cache.length, length, chunk):
        if interrupted() is not None:
            return None
        fed = context[begin : min(begin + chunk, length)]
        if begin + chunk < length:
            chooser.feed(fed, begin)
        else:
            last = Pass(fed=fed, cache_length=begin, num_rows=1, text=context, length=length, follow=follow_nothing)
            choice = chooser.choose(last, goes_on)
        cache.commit(fed, prefill=True)
    return choice


def _successors(session: VerifierSession, rows: int) -> Int64 | None:
    """The target's likeliest tokens behind the last pass's first rows: int64 [rows, k], where the engine tells them."""
    top = session.top_tokens
    return None if top is None else top[:rows]


def _check(draft: Draft, contract: Contract) -> None:
    tokens = draft.tokens
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= contract.vocab_size):
        raise GenerationError(f"the drafter proposed {tokens.tolist()}; ids below {contract.vocab_size} were expected")
