"""The loop: draft K tokens ▸ verify [pending, d1..dK] ▸ accept the longest matching prefix ▸ commit ▸ emit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH, Contract
from engines.row_invariance import RowInvariance
from quasar.errors import ContextLimitError, GenerationError
from runtime.acceptance import accepted_prefix
from runtime.drafters.base import NO_DRAFT, Draft, Drafter
from runtime.kv_cache import KVCache
from runtime.sampling.chooser import Choice, GoesOn, TokenChooser
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
    cache: KVCache,
    contract: Contract,
    drafter: Drafter | None,
    num_draft_tokens: int = 0,
    exact: RowInvariance = RowInvariance(chain=1, widest=MAX_WIDTH),  # noqa: B008 - immutable
    interrupted: Callable[[], str | None] = lambda: None,
) -> Iterator[Round]:
    """Generate from `prompt` int64 [n]; the first `Round` is the prefill's, with one token.

    Args:
        chooser: runs passes and chooses their tokens.
        cache: rows of an earlier text; what serves this prompt is kept.
        drafter: None decodes plainly.
        num_draft_tokens: drafts per round, at most.
        exact: which passes are exact on this machine; narrower ones are padded, wider ones are not made.
        interrupted: asked before every pass; a reason ends the text, and stays.
    """
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
    reused = drafted = 0
    draft_seconds = 0.0
    draft = NO_DRAFT.tokens
    choice = None
    if interrupted() is None:
        reused = cache.reusable(prompt, decoded_rows=exact.prefill)
        cache.truncate(reused)
        choice = _prefill(chooser, prompt, cache, contract.prefill_chunk, interrupted, goes_on)
    while True:
        if choice is None:
            stop.end()
            cut, choice = Cut(finish_reason=interrupted()), _NOTHING
        emitted = choice.tokens
        context[length : length + len(emitted)] = emitted
        length += len(emitted)
        yield Round(
            tokens=tuple(emitted.tolist()),
            drafted=drafted,
            accepted=accepted_prefix(draft[: len(emitted)], emitted),
            seconds=time.perf_counter() - start,
            draft_seconds=draft_seconds,
            finish_reason=cut.finish_reason,
            stopped_by=cut.stopped_by,
            logprobs=choice.logprobs,
            sample_seconds=choice.seconds,
            reused=reused,
        )
        if cut.finish_reason is not None:
            return
        start = time.perf_counter()
        reused = drafted = 0
        draft, draft_seconds = NO_DRAFT.tokens, 0.0
        if interrupted() is not None:
            choice = None
            continue
        # One row for the pending token; a draft whose row would not fit, or whose token would be cut, is not asked for.
        wanted = min(num_draft_tokens, stop.left - 1, cache.room - 1, exact.drafts_before_boundary(cache.length))
        draft = _propose(drafter, context[:length], wanted, contract).tokens
        drafted = len(draft)
        draft_seconds = time.perf_counter() - start
        context[length : length + drafted] = draft
        fed = _padded(context[length - 1 : length + drafted], exact.chain or 1)
        choice = chooser.choose(fed, cache.length, len(fed), context[: length + drafted], draft, goes_on)
        # The pending token and the drafts before the last token, which has no row of its own yet.
        cache.commit(fed[: len(choice.tokens)])


def _prefill(
    chooser: TokenChooser,
    prompt: Int64,
    cache: KVCache,
    chunk: int,
    interrupted: Callable[[], str | None],
    goes_on: GoesOn,
) -> Choice | None:
    """Feed the prompt behind the rows that are there, cut at fixed multiples of the engine's chunk.

    Returns the first new token, or None if it was interrupted.
    """
    choice = None
    for begin in range(cache.length, len(prompt), chunk):
        if interrupted() is not None:
            return None
        end = min(begin + chunk, len(prompt))
        if end < len(prompt):
            chooser.feed(prompt[begin:end], begin)
        else:
            choice = chooser.choose(prompt[begin:], begin, 1, prompt, NO_DRAFT.tokens, goes_on)
        cache.commit(prompt[begin:end], prefill=True)
    return choice


def _propose(drafter: Drafter | None, context: Int64, wanted: int, contract: Contract) -> Draft:
    if drafter is None or wanted <= 0:
        return NO_DRAFT
    draft = drafter.propose(context, wanted)
    if draft.parents is not None:
        raise GenerationError("the drafter proposed a tree; trees are not exact on this engine, so only chains are run")
    tokens = draft.tokens
    if len(tokens) > wanted or (len(tokens) and (tokens.min() < 0 or tokens.max() >= contract.vocab_size)):
        raise GenerationError(
            f"the drafter proposed {tokens.tolist()}; at most {wanted} ids below {contract.vocab_size} were expected"
        )
    return draft


def _padded(fed: Int64, plain_width: int) -> Int64:
    return fed if len(fed) >= plain_width else np.pad(fed, (0, plain_width - len(fed)), mode="edge")
