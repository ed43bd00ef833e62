"""Choosing the target's tokens of one verify pass, row by row, until a draft is not what was chosen.

A row's token depends on its logits, its own context and its position alone: not on how many rows were fed with it. Rows
behind a rejected draft are never looked at.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.contract import Contract
from plugins.sample_token import NO_NUMBERS, NOTHING_LEFT, Filters, sample_token
from quasar.errors import GenerationError
from runtime.acceptance import Follow
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

    @property
    def top_tokens(self) -> Int64 | None:
        """The target's likeliest tokens behind the rows of the last call: int64 [rows, k]; None where it tells none."""

    def run(self, token_ids: Int64, cache_length: int, num_logits_rows: int, parents: Int64 | None = None, /) -> Int64:
        """Feed tokens behind the committed rows; the target's token after each of the last rows: int64 [rows]."""

    def run_logits(
        self,
        token_ids: Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: Int64 | None = None,
        /,
        *,
        out: Float32 | None = None,
    ) -> Float32:
        """The same with the logits of those rows: float32 [rows, V], in `out` where it is given."""

    def compact(self, cache_length: int, path: Sequence[int] | Int64, /) -> None:
        """Move the new rows of an accepted tree path to the front."""


# A generation's filters and seed → what draws its tokens, from a row of logits and a position.
TokenSampler = Callable[[Filters, int], Callable[[Float32, int], int]]


def reference_sampler(filters: Filters, seed: int) -> Callable[[Float32, int], int]:
    """`plugins.sample_token`, where its compiled form is not to be had."""
    return lambda logits, position: sample_token(logits, filters, seed=seed, position=position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The tokens that a pass emits, accepted drafts first, with their log-probabilities where they were asked for.

    `rows`: the row of the pass that each of them was chosen behind. `seconds`: spent on choosing, beside the pass.
    """

    tokens: Int64
    rows: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    seconds: float = 0.0


# A token of the text → whether more may follow.
GoesOn = Callable[[int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What is fed, behind `cache_length` committed rows, and which of its rows are chosen from: the last `num_rows`.

    `fed` int64 [T]: a chunk of the prompt, or the pending token, drafts and padding. `parents` int64 [T]: of a tree
    (engines.tree). `follow`: from one of the rows, counted from the first of the last ones, and the token chosen behind
    it to the row of the draft that is this token.

    `text`: a buffer with the context in its first `length` places; tokens are written behind them as they are chosen.
    """

    fed: Int64
    cache_length: int
    num_rows: int
    text: Int64
    length: int
    follow: Follow
    parents: Int64 | None = None


class TokenChooser(Protocol):
    """Runs passes and chooses their tokens."""

    def feed(self, tokens: Int64, cache_length: int) -> None:
        """Feed a chunk of the prompt that no token is chosen after."""

    def choose(self, step: Pass, goes_on: GoesOn) -> Choice:
        """Make a pass and choose its tokens, which are then in `step.text` too.

        Args:
            goes_on: told every token that is emitted; nothing is chosen behind one that ends the text.
        """


class GreedyChooser:
    """The most likely token, found in the graph."""

    def __init__(self, session: VerifierSession) -> None:
        self._session = session

    def feed(self, tokens: Int64, cache_length: int) -> None:
        """As `TokenChooser`."""
        self._session.run(tokens, cache_length, 1)

    def choose(self, step: Pass, goes_on: GoesOn) -> Choice:
        """As `TokenChooser`."""
        next_tokens = self._session.run(step.fed, step.cache_length, step.num_rows, step.parents).tolist()
        return _walk(step, lambda row, _: int(next_tokens[row]), goes_on)


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

    def choose(self, step: Pass, goes_on: GoesOn) -> Choice:
        """As `TokenChooser`."""
        rows = self._session.run_logits(step.fed, step.cache_length, step.num_rows, step.parents, out=self._buffer())
        start = time.perf_counter()
        logprobs: list[TokenLogprob] = []

        def choose_at(place: int, position: int) -> int:
            row = rows[place]
            kept = None if self._options.logprobs is None else RowLogprobs(row, self._options.logprobs)
            if self._changes is not None:
                row = self._changes.apply(row, step.text[:position])
            token = self._pick(row, position)
            if self._changes is not None:
                self._changes.add(token)
            if kept is not None:
                logprobs.append(kept.of(token))
            return token

        chosen = _walk(step, choose_at, goes_on)
        return replace(chosen, logprobs=tuple(logprobs), seconds=time.perf_counter() - start)

    def _pick(self, row: Float32, position: int) -> int:
        if self._draw is not None:
            return self._draw(row, position)
        token = int(row.argmax())
        if not np.isfinite(row[token]):
            raise GenerationError(NOTHING_LEFT if row[token] == -np.inf else NO_NUMBERS)
        return token


def _walk(step: Pass, choose_at: Callable[[int, int], int], goes_on: GoesOn) -> Choice:
    """From the pending token's row down the drafts that are chosen, until one is not or the text ends.

    `choose_at`: a row and its token's position → the target's token there.
    """
    rows: list[int] = []
    row: int | None = 0
    position = step.length
    while row is not None:
        token = choose_at(row, position)
        rows.append(row)
        step.text[position] = token
        position += 1
        row = step.follow(row, token) if goes_on(token) else None
    return Choice(tokens=step.text[step.length : position].copy(), rows=tuple(rows))
