"""SuffixAutomaton: where the end of a sequence occurred before, and what followed; updated token by token.

A state of the automaton (Blumer et al. 1985) stands for the strings that end at the same places of the sequence; a
transition reads one more token. The suffix link of a state leads to the longest of the shorter strings that end at more
places. Every string of the sequence is read from the root; n tokens have at most 2n states and 3n transitions.

Ids of states stay. State 2p is that of the first p tokens (0, the root, is the empty string's), state 2k + 1 the k-th
that was split off from another: the shorter strings of a state may move to a new one, so a place that is kept while the
sequence grows is a state and the length of the string in it (`advance` looks where it is now).

Each new token adds to the counts, and sets the most recent ends, along the suffix links from the whole sequence's
state: along 64 of them at most, since a sequence that repeats one token has as many as it has tokens. So a count and an
end are exact where the state was never more than 64 links away when its strings ended the sequence; else the count is
too low, and the end that of an earlier occurrence. Lengths, links and transitions are always exact. A token takes few
steps on average, though one that follows a long repetition can take as many as that has tokens.
"""

import heapq
import sys
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError

Int64 = NDArray[np.int64]

MOST_TOKENS = 1 << 26
COUNTED_LINKS = 64
_ROOT, _NONE = 0, -1
_LARGEST_ID = (1 << 31) - 1


class Successors(NamedTuple):
    """What followed the strings of a state, the most frequent first and then the most recent: int64 [n] each.

    `tokens`; the `states` that they lead to; how often they followed (`counts`); the place of their most recent
    occurrence in the sequence (`ends`): what followed it there is sequence[end + 1:].
    """

    tokens: Int64
    states: Int64
    counts: Int64
    ends: Int64


class SuffixAutomaton:
    """The reference: dictionaries. For one thread at a time."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        self._tokens = 0
        self._splits = 0
        # By state; the odd ones stay empty until a state is split.
        self._lengths = [0, 0]
        self._links = [_NONE, _NONE]
        self._counts = [0, 0]
        self._ends = [-1, -1]
        self._next: list[dict[int, int]] = [{}, {}]

    def __len__(self) -> int:
        return self._tokens

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use; here those of the containers, counted one by one."""
        tables = (self._lengths, self._links, self._counts, self._ends, self._next)
        return sum(map(sys.getsizeof, tables)) + sum(map(sys.getsizeof, self._next))

    def extend(self, tokens: Int64) -> None:
        """Append tokens int64 [n], each at least 0 and below 2^31.

        Raises:
            GenerationError: another type, shape or id came (nothing is appended then), or more than 2^26 tokens in all.
        """
        check_room(len(self), len(tokens))
        check_tokens(tokens)
        for token in tokens.tolist():
            self._append(token)

    def match(self) -> tuple[int, int]:
        """State and length of the sequence's longest suffix that also ended earlier in it; (0, 0) where none did."""
        return self.shorter(2 * self._tokens)

    def shorter(self, state: int) -> tuple[int, int]:
        """State and length of the longest suffix of the state's strings that ends at more places; (0, 0) of the root.

        Raises `ValueError`, as all methods do that take a state, for one that there is not.
        """
        self._check(state)
        link = max(self._links[state], _ROOT)
        return link, self._lengths[link]

    def count(self, state: int) -> int:
        """How often the state's strings end in the sequence; of the root, the number of tokens."""
        self._check(state)
        return self._counts[state]

    def successors(self, state: int, limit: int) -> Successors:
        """What followed the state's strings: the first `limit` of that."""
        self._check(state)
        found = heapq.nlargest(
            limit, ((self._counts[to], self._ends[to], token, to) for token, to in self._next[state].items())
        )
        counts, ends, tokens, states = np.array(found, np.int64).reshape(-1, 4).T.copy()
        return Successors(tokens, states, counts, ends)

    def find(self, tokens: Int64) -> tuple[int, int]:
        """State and length of the longest suffix of `tokens` int64 [n] in the sequence; errors as of `extend`."""
        return self.advance(_ROOT, 0, tokens)

    def advance(self, state: int, length: int, tokens: Int64) -> tuple[int, int]:
        """The same for `tokens` after a string in the sequence: one of that length, of `state` when it was found.

        The length may be less than that of the state's longest string.

        Raises:
            GenerationError: as `extend`.
            ValueError: there is no such state, or it has no string of that length.
        """
        check_tokens(tokens)
        self._check(state)
        if not (0 < length <= self._lengths[state] or length == state == _ROOT):
            raise no_place(state, length)
        while state != _ROOT and length <= self._lengths[self._links[state]]:
            state = self._links[state]
        for token in tokens.tolist():
            while token not in self._next[state] and state != _ROOT:
                state = self._links[state]
                length = self._lengths[state]
            if token in self._next[state]:
                state = self._next[state][token]
                length += 1
        return state, length

    def _append(self, token: int) -> None:
        new, place = 2 * self._tokens + 2, self._tokens
        self._tokens += 1
        self._lengths += (self._tokens, 0)
        self._links += (_ROOT, _NONE)
        self._counts += (1, 0)
        self._ends += (place, -1)
        self._next += ({}, {})
        state = new - 2
        while state != _NONE and token not in self._next[state]:
            self._next[state][token] = new
            state = self._links[state]
        if state != _NONE:
            target = self._next[state][token]
            if self._lengths[target] > self._lengths[state] + 1:
                target = self._split(state, token, target)
            self._links[new] = target
        self._counts[_ROOT] += 1
        state = self._links[new]
        for _ in range(COUNTED_LINKS):
            if state == _ROOT:
                break
            self._counts[state] += 1
            self._ends[state] = place
            state = self._links[state]

    def _split(self, state: int, token: int, target: int) -> int:
        """Move the strings of `target` that are at most one longer than `state`'s to a state of their own."""
        new = 2 * self._splits + 1
        self._splits += 1
        self._lengths[new] = self._lengths[state] + 1
        self._links[new] = self._links[target]
        self._counts[new] = self._counts[target]
        self._next[new] = self._next[target].copy()
        self._links[target] = new
        while state != _NONE and self._next[state].get(token) == target:
            self._next[state][token] = new
            state = self._links[state]
        return new

    def _check(self, state: int) -> None:
        if not 0 <= state // 2 < (self._splits if state % 2 else self._tokens + 1):
            raise no_state(state)


def check_tokens(tokens: Int64) -> None:
    """Raise `GenerationError` unless these are int64 [n], each at least 0 and below 2^31."""
    if tokens.dtype != np.int64 or tokens.ndim != 1:
        raise GenerationError(f"tokens are an array of {tokens.dtype} {list(tokens.shape)}; int64 [n] was expected")
    wrong = tokens[(tokens < 0) | (tokens > _LARGEST_ID)]
    if len(wrong):
        raise GenerationError(f"the token id {wrong[0]} came; 0 to {_LARGEST_ID} was expected")


def check_room(length: int, more: int) -> None:
    """Raise `GenerationError` where an automaton of `length` tokens has no room for so many more."""
    if length + more > MOST_TOKENS:
        raise GenerationError(f"a sequence of {length + more} tokens came; a suffix automaton holds {MOST_TOKENS}")


def no_state(state: int) -> ValueError:
    """What is raised for a state that there is not."""
    return ValueError(f"state {state} came; this automaton has none of that id")


def no_place(state: int, length: int) -> ValueError:
    """What is raised for a length that none of the state's strings has."""
    return ValueError(f"length {length} of state {state} came; it has no string of that length")
