"""Choosing the target's tokens of one verify pass, row by row, until a draft is not what was chosen.

A row's token depends on its logits, its own context and its position alone: not on how many rows were fed with it. Rows
behind a rejected draft are never looked at.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from plugins.sample_token import NO_NUMBERS, NOTHING_LEFT, Filters, sample_token
from quasar.errors import GenerationError
from runtime.acceptance import accepted_prefix
from runtime.options import GenerationOptions
from runtime.sampling.logprobs import RowLogprobs, TokenLogprob
from runtime.sampling.processors import LogitsChanges

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class VerifierSession(Protocol):
    """What the loop needs of a session."""

    @property
    def contract(self) -> Contract:
        """Sizes."""

    def run(self, token_ids: Int64, cache_length: int, num_logits_rows: int, /) -> Int64:
        """Feed tokens behind the committed rows; the target's token after each of the last rows: int64 [rows]."""

    def run_logits(
        self, token_ids: Int64, cache_length: int, num_logits_rows: int, /, *, out: Float32 | None = None
    ) -> Float32:
        """The same with the logits of those rows: float32 [rows, V], in `out` where it is given."""


# A generation's filters and seed → what draws its tokens, from a row of logits and a position.
TokenSampler = Callable[[Filters, int], Callable[[Float32, int], int]]


def reference_sampler(filters: Filters, seed: int) -> Callable[[Float32, int], int]:
    """`plugins.sample_token`, where its compiled form is not to be had."""
    return lambda logits, position: sample_token(logits, filters, seed=seed, position=position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The tokens that a pass emits, accepted drafts first, with their log-probabilities where they were asked for.

    `seconds`: spent on choosing, beside the pass.
    """

    tokens: Int64
    logprobs: tuple[TokenLogprob, ...] = ()
    seconds: float = 0.0


# A token of the text → whether more may follow.
GoesOn = Callable[[int], bool]


class TokenChooser(Protocol):
    """Runs passes and chooses their tokens."""

    def feed(self, tokens: Int64, cache_length: int) -> None:
        """Feed a chunk of the prompt that no token is chosen after."""

    def choose(
        self, fed: Int64, cache_length: int, num_rows: int, context: Int64, draft: Int64, goes_on: GoesOn
    ) -> Choice:
        """Feed `fed` behind `cache_length` rows, and choose from the last `num_rows` of its rows.

        Args:
            context: prompt, text and drafts: int64 [n + K]; the first of the rows follows the first n of them.
            draft: int64 [K]: the drafts that are accepted while they are what is chosen.
            goes_on: told every token that is emitted; nothing is chosen behind one that ends the text.
        """


class GreedyChooser:
    """The most likely token, found in the graph."""

    def __init__(self, session: VerifierSession) -> None:
        self._session = session

    def feed(self, tokens: Int64, cache_length: int) -> None:
        """As `TokenChooser`."""
        self._session.run(tokens, cache_length, 1)

    def choose(
        self,
        fed: Int64,
        cache_length: int,
        num_rows: int,
        context: Int64,  # noqa: ARG002 - the graph needs none
        draft: Int64,
        goes_on: GoesOn,
    ) -> Choice:
        """As `TokenChooser`."""
        next_tokens = self._session.run(fed, cache_length, num_rows)[: len(draft) + 1]
        count = accepted_prefix(draft, next_tokens) + 1
        for place, token in enumerate(next_tokens[:count].tolist(), start=1):
            if not goes_on(token):
                count = place
                break
        return Choice(tokens=next_tokens[:count].copy())


class LogitsChooser:
    """Tokens chosen from logits: changed by options and hooks, drawn by the sampler or the most likely one."""

    def __init__(
        self,
        session: VerifierSession,
        options: GenerationOptions,
        changes: LogitsChanges | None,
        *,
        sampler: TokenSampler,
        seed: int,
        buffer: Callable[[], Float32],
    ) -> None:
        """`buffer` gives float32 [rows, V] to compute logits into: called within a turn on the session."""
        self._session, self._options, self._changes = session, options, changes
        self._draw = sampler(options.filters, seed) if options.temperature > 0 else None
        self._buffer = buffer

    def feed(self, tokens: Int64, cache_length: int) -> None:
        """As `TokenChooser`."""
        self._session.run(tokens, cache_length, 1)

    def choose(
        self, fed: Int64, cache_length: int, num_rows: int, context: Int64, draft: Int64, goes_on: GoesOn
    ) -> Choice:
        """As `TokenChooser`."""
        rows = self._session.run_logits(fed, cache_length, num_rows, out=self._buffer())
        start = time.perf_counter()
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        length = len(context) - len(draft)
        for place in range(len(draft) + 1):
            row = rows[place]
            kept = None if self._options.logprobs is None else RowLogprobs(row, self._options.logprobs)
            if self._changes is not None:
                row = self._changes.apply(row, context[: length + place])
            token = self._pick(row, length + place)
            tokens.append(token)
            if self._changes is not None:
                self._changes.add(token)
            if kept is not None:
                logprobs.append(kept.of(token))
            if not goes_on(token) or place == len(draft) or token != draft[place]:
                break
        return Choice(tokens=np.array(tokens, np.int64), logprobs=tuple(logprobs), seconds=time.perf_counter() - start)

    def _pick(self, row: Float32, position: int) -> int:
        if self._draw is not None:
            return self._draw(row, position)
        token = int(row.argmax())
        if not np.isfinite(row[token]):
            raise GenerationError(NOTHING_LEFT if row[token] == -np.inf else NO_NUMBERS)
        return token
