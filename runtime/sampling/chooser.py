"""Choosing the target's token after one position of a pass.

The token depends on the position's logits, its own context and its place in the sequence alone: not on how many
positions were fed with it.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from plugins.sample_token import Filters, check_largest, sample_token
from runtime.generation_options import GenerationOptions
from runtime.grammar.matcher import GrammarState
from runtime.sampling.logprobs import RowLogprobs, TokenLogprob
from runtime.sampling.processors import LogitsChanges
from runtime.segment import Targets

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

# A generation's filters and seed → what draws its tokens, from a row of logits and a position.
TokenSampler = Callable[[Filters, int], Callable[[Float32, int], int]]


def reference_sampler(filters: Filters, seed: int) -> Callable[[Float32, int], int]:
    """`plugins.sample_token`, where its compiled form is not to be had."""
    return lambda logits, position: sample_token(logits, filters, seed=seed, position=position)


class TokenChooser(Protocol):
    """Chooses the tokens of one sequence, in their order. `wants_logits`: from logits, not from the graph's choice."""

    wants_logits: bool

    def choose(self, targets: Targets, place: int, context: Int64) -> int:
        """The token after a place of the pass; `context` int64 [n] is what comes before it."""

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those of the tokens that were chosen since the last call; empty where none were asked for."""


class GreedyChooser:
    """The most likely token, found in the graph."""

    wants_logits = False

    def choose(self, targets: Targets, place: int, context: Int64) -> int:  # noqa: ARG002 - the form of `TokenChooser`
        """As `TokenChooser`."""
        assert targets.next_tokens is not None
        return int(targets.next_tokens[place])

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """As `TokenChooser`."""
        return ()


class LogitsChooser:
    """Tokens chosen from logits: changed by options and hooks, masked by a grammar, drawn or the most likely one."""

    wants_logits = True

    def __init__(
        self,
        options: GenerationOptions,
        changes: LogitsChanges | None,
        *,
        sampler: TokenSampler,
        seed: int,
        grammar: GrammarState | None = None,
    ) -> None:
        self._logprobs, self._changes, self._grammar = options.logprobs, changes, grammar
        # What a hook returns may be an array that it keeps.
        self._is_others = options.logits_processor is not None
        self._draw = sampler(options.filters, seed) if options.temperature > 0 else None
        self._found: list[TokenLogprob] = []

    def choose(self, targets: Targets, place: int, context: Int64) -> int:
        """As `TokenChooser`."""
        assert targets.logits is not None
        row = targets.logits[place]
        logprobs = None if self._logprobs is None else RowLogprobs(row, self._logprobs)
        if self._changes is not None:
            row = self._changes.apply(row, context)
        if self._grammar is not None:
            row = row.copy() if self._is_others else row
            self._grammar.mask(row)
        token = self._pick(row, len(context))
        if self._changes is not None:
            self._changes.add(token)
        if self._grammar is not None:
            self._grammar.take(token)
        if logprobs is not None:
            self._found.append(logprobs.of(token))
        return token

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """As `TokenChooser`."""
        found, self._found = tuple(self._found), []
        return found

    def _pick(self, row: Float32, position: int) -> int:
        if self._draw is not None:
            return self._draw(row, position)
        token = int(row.argmax())
        check_largest(float(row[token]))
        return token
