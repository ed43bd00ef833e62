"""Where an answer stands in its grammar: what may come next, and how far a draft follows it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GrammarError
from runtime.drafters.base import NO_DRAFT, Draft

if TYPE_CHECKING:
    from llguidance import LLMatcher

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_Value = TypeVar("_Value")

# Seconds of a thread that following a round's drafts may take: with a grammar that needs more, only forced tokens are
# drafted from there on. The limits of a grammar bound a token, and a draft has many.
_SLOW_SECONDS = 0.02


class GrammarState:
    """The state after the answer so far. What may follow depends on the tokens taken alone, not on what was asked.

    Where the grammar leaves one text, it is spelled in one way, as the tokenizer spells it: these tokens are forced.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        *,
        renew: Callable[[], "LLMatcher"],
        vocab_size: int,
        other_ends: frozenset[int] = frozenset(),
    ) -> None:
        """A state of its own for one request.

        Args:
            matcher: at the answer's beginning; nobody else uses it.
            renew: makes another one, which shares nothing with others.
            vocab_size: of the logits.
            other_ends: tokens that end the answer besides the grammar's own end ids.
        """
        self._matcher, self._renew, self._vocab_size = matcher, renew, vocab_size
        self._other_ends = np.array(sorted(other_ends), np.int64)
        self._is_other_end = other_ends
        self._taken: list[int] = []
        # Tokens that are known to come, from the next one on; None: nobody has looked yet.
        self._forced: list[int] | None = None
        # Seconds of following drafts since the last token; and that it takes too long.
        self._spent = 0.0
        self._slow = False

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """The tokens that must come next, in order; empty where there is a choice."""
        if self._forced is None:
            self._forced = self._ask(lambda matcher: matcher.compute_ff_tokens())
        return self._forced

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if forced := self.forced():
            return token == forced[0]
        if token in self._is_other_end:
            return self._ask(lambda matcher: matcher.is_accepting())
        return self._ask(lambda matcher: matcher.validate_tokens([token])) == 1

    def mask(self, logits: Float32) -> None:
        """Make the logits float32 [V] of all tokens that may not come next -inf, in place."""
        if forced := self.forced():
            kept = logits[forced[0]]
            logits.fill(-np.inf)
            logits[forced[0]] = kept
            return
        bits = np.frombuffer(self._ask(lambda matcher: matcher.compute_bitmask()), np.uint8)
        excluded = np.unpackbits(~bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if len(self._other_ends) and self._ask(lambda matcher: matcher.is_accepting()):
            excluded[self._other_ends] = False
        np.putmask(logits, excluded, np.float32(-np.inf))

    def take(self, token: int) -> None:
        """The next token of the answer.

        Raises:
            GrammarError: the grammar needs more than its limits allow; the answer cannot go on.
        """
        forced = self.forced()
        if token in self._is_other_end and not forced:
            # Nothing comes after it, and the grammar does not know it.
            return
        self._ask(lambda matcher: matcher.consume_token(token))
        self._taken.append(token)
        self._forced = forced[1:] or None
        self._spent = 0.0

    def prune(self, draft: Draft, *, after: list[int]) -> Draft:
        """The part of a draft that the grammar lets through, where the tokens `after` come before it.

        A chain is cut, and of a tree whole branches go. A draft with ids outside the vocabulary is left as it is.
        """
        count = len(draft.tokens)
        if not count or draft.tokens.min() < 0 or draft.tokens.max() >= self._vocab_size:
            return draft
        if self._slow:
            return NO_DRAFT
        with self._timed():
            return self._pruned(draft, after)

    def permits(self, path: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Whether each of these tokens may come where the tokens of `path` come before it: drafts of a head."""
        if self._slow:
            return [False] * len(tokens)
        with self._timed():
            return [self._follows([*path, token]) > len(path) for token in tokens]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What all drafters of a round take is one sum."""
        start = time.thread_time()
        yield
        self._spent += time.thread_time() - start
        self._slow = self._spent > _SLOW_SECONDS

    def _pruned(self, draft: Draft, after: list[int]) -> Draft:
        count, tokens = len(draft.tokens), draft.tokens.tolist()
        if draft.parents is None:
            kept = self._follows([*after, *tokens]) - len(after)
            return draft if kept >= count else _part(draft, list(range(max(0, kept))))
        return _part(draft, self._kept_of_tree(tokens, draft.parents.tolist(), after))

    def _kept_of_tree(self, tokens: list[int], parents: list[int], after: list[int]) -> list[int]:
        """Places of a tree that the grammar lets through, parents first: its paths are followed one by one."""
        inner = set(parents)
        known: dict[int, bool] = {-1: True}
        for leaf in range(len(tokens)):
            if leaf in inner:
                continue
            path, place = [], leaf
            while place >= 0:
                path.append(place)
                place = parents[place]
            path.reverse()
            ends = next((one for one in path if not known.get(one, True)), None)
            if ends is None:
                length = self._follows([*after, *(tokens[one] for one in path)]) - len(after)
                known.update((one, depth < length) for depth, one in enumerate(path))
        kept = []
        for place, parent in enumerate(parents):
            # Below a token that was refused nothing was looked at.
            known[place] = known.get(place, False) and known[parent]
            if known[place]:
                kept.append(place)
        return kept

    def _follows(self, tokens: list[int]) -> int:
        """How many of these tokens may come, one after the other."""
        length = int(self._matcher.validate_tokens(tokens))
        if self._matcher.is_error():
            # Too much for its limits. That a draft went there must not end the answer.
            self._restart()
            return 0
        return length

    def _ask(self, question: Callable[["LLMatcher"], _Value]) -> _Value:
        """What the matcher says; one that has come to its limits is asked again without what it shares with others."""
        answer = question(self._matcher)
        if self._matcher.is_error():
            self._restart()
            answer = question(self._matcher)
            if self._matcher.is_error():
                raise GrammarError(
                    f"response_format went beyond its limits after {len(self._taken)} tokens: "
                    f"{' '.join(self._matcher.get_error().split())[:300]}"
                )
        return answer

    def _restart(self) -> None:
        self._matcher = self._renew()
        self._matcher.consume_tokens(self._taken)


def _part(draft: Draft, kept: list[int]) -> Draft:
    """The tokens of a draft at these places, parents first."""
    if not kept:
        return NO_DRAFT
    new_place = {-1: -1} | {place: new for new, place in enumerate(kept)}
    parents = None
    if draft.parents is not None:
        parents = np.array([new_place[int(draft.parents[place])] for place in kept], np.int64)
    return Draft(
        tokens=draft.tokens[kept],
        parents=parents,
        evidence=None if draft.evidence is None else draft.evidence[kept],
    )
