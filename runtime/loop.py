"""The loop: draft K tokens ▸ verify [pending, d1..dK] ▸ accept the longest matching prefix ▸ commit ▸ emit."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH, Contract
from engines.row_invariance import RowInvariance
from quasar.errors import ContextLimitError, GenerationError
from runtime.acceptance import accepted_prefix
from runtime.drafters.base import NO_DRAFT, Draft, Drafter
from runtime.kv_cache import KVCache

Int64 = NDArray[np.int64]


class VerifierSession(Protocol):
    """What the loop needs of a session."""

    @property
    def contract(self) -> Contract:
        """Sizes."""

    def run(self, token_ids: Int64, cache_length: int, num_logits_rows: int, /) -> Int64:
        """Feed tokens behind the committed rows; the target's token after each of the last rows: int64 [rows]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step's outcome: tokens emitted, how many were drafted and kept, and its seconds. Prefill drafts nothing."""

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    seconds: float
    draft_seconds: float
    finish_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop: after so many new tokens, or behind one of the end ids."""

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()


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
    session: VerifierSession,
    prompt: Int64,
    limits: Limits,
    *,
    drafter: Drafter | None,
    num_draft_tokens: int = 0,
    exact: RowInvariance = RowInvariance(chain=1, widest=MAX_WIDTH),  # noqa: B008 - immutable
) -> Iterator[Round]:
    """Generate greedily from `prompt` int64 [n]; the first `Round` is the prefill's, with one token.

    Args:
        drafter: None decodes plainly.
        num_draft_tokens: drafts per round, at most.
        exact: which passes are exact on this machine; narrower ones are padded, wider ones are not made.
    """
    contract, cache = session.contract, KVCache(session.contract)
    # The last token needs no row of its own, and the cache may end the text before max_new_tokens does.
    limit = min(limits.max_new_tokens, contract.max_length - len(prompt))
    context = np.empty(len(prompt) + limit, np.int64)
    context[: len(prompt)] = prompt
    length = len(prompt)

    start = time.perf_counter()
    pending = _prefill(session, prompt, cache)
    drafted = accepted = 0
    draft_seconds = 0.0
    emitted = np.array([pending], np.int64)
    while True:
        emitted, finish_reason = _cut(emitted, length - len(prompt), limit, limits)
        context[length : length + len(emitted)] = emitted
        length += len(emitted)
        now = time.perf_counter()
        yield Round(
            tokens=tuple(emitted.tolist()),
            drafted=drafted,
            accepted=min(accepted, len(emitted)),
            seconds=now - start,
            draft_seconds=draft_seconds,
            finish_reason=finish_reason,
        )
        if finish_reason is not None:
            return
        start = time.perf_counter()
        # One row for the pending token; a draft whose row would not fit, or whose token would be cut, is not asked for.
        wanted = min(
            num_draft_tokens,
            len(prompt) + limit - length - 1,
            cache.room - 1,
            exact.drafts_before_boundary(cache.length),
        )
        draft = _propose(drafter, context[:length], wanted, contract)
        drafted = len(draft.tokens)
        draft_seconds = time.perf_counter() - start
        fed = _padded(context[length - 1 : length], draft.tokens, exact.chain or 1)
        next_tokens = session.run(fed, cache.length, len(fed))[: drafted + 1]
        accepted = accepted_prefix(draft.tokens, next_tokens)
        cache.commit(accepted + 1)
        emitted = next_tokens[: accepted + 1].copy()


def _prefill(session: VerifierSession, prompt: Int64, cache: KVCache) -> int:
    """Feed the prompt, cut at fixed multiples of the engine's chunk; returns the first new token."""
    chunk = session.contract.prefill_chunk
    token = -1
    for begin in range(0, len(prompt), chunk):
        part = prompt[begin : begin + chunk]
        token = int(session.run(part, begin, 1)[0])
        cache.commit(len(part))
    return token


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


def _padded(pending: Int64, draft: Int64, plain_width: int) -> Int64:
    fed = np.concatenate([pending, draft])
    return fed if len(fed) >= plain_width else np.pad(fed, (0, plain_width - len(fed)), mode="edge")


def _cut(emitted: Int64, already: int, limit: int, limits: Limits) -> tuple[Int64, str | None]:
    """Cut behind the first end id and at the limit; says why the text ends, if it does."""
    stops = [place for place, token in enumerate(emitted.tolist()) if token in limits.stop_ids]
    if stops and already + stops[0] + 1 <= limit:
        return emitted[: stops[0] + 1], "stop"
    if already + len(emitted) >= limit:
        return emitted[: limit - already], "length"
    return emitted, None
