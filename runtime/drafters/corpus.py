"""Sequences that `Suffix` may copy from besides its own: bounded, the oldest forgotten first."""

import threading

import numpy as np

from plugins.cpu.suffix_automaton import Automaton, open_automaton
from quasar.errors import GenerationError
from runtime.drafters.base import Int64

# Stands between two sequences, so that no match reaches over the end of one: no vocabulary has it.
_SEPARATOR = (1 << 31) - 1
# Where a corpus has changed, so much of a context's end is looked up anew: the longest match that is told apart is
# shorter (`suffix._LENGTH_BOUNDS`).
_LOOKED_UP = 64


class _Half:
    """Sequences one after the other, and their automaton."""

    def __init__(self, capacity: int) -> None:
        self.tokens = np.empty(capacity, np.int32)
        self.length = 0
        self.automaton: Automaton = open_automaton()

    def add(self, tokens: Int64) -> None:
        self.tokens[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)
        self.automaton.extend(tokens)


class Corpus:
    """Sequences to copy from, up to `max_tokens` in all. Thread-safe. One per user: latency tells what is in it.

    Two halves: when the newer one is full, the older one is dropped. So at least half of what fits is remembered.
    """

    def __init__(self, max_tokens: int = 1_000_000) -> None:
        if max_tokens < 2:
            raise GenerationError(f"max_tokens is {max_tokens}; 2 or more was expected")
        self._capacity = max_tokens // 2
        self.lock = threading.Lock()
        # The newest last.
        self.halves = [_Half(self._capacity)]
        # How often something was added or dropped.
        self.changes = 0

    def add(self, token_ids: Int64 | list[int] | tuple[int, ...]) -> None:
        """Remember a sequence, an answer's `token_ids`, say; of one that is longer than half of what fits, its end."""
        try:
            tokens = np.asarray(token_ids, np.int64)
        except (OverflowError, TypeError, ValueError):
            tokens = np.full(1, -1)
        if tokens.ndim != 1 or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < _SEPARATOR):
            raise GenerationError("a sequence for the corpus must be a list of token ids, 0 to 2^31 - 2")
        tokens = np.append(tokens, _SEPARATOR)[-self._capacity :]
        with self.lock:
            if self.halves[-1].length + len(tokens) > self._capacity:
                self.halves = [self.halves[-1], _Half(self._capacity)]
            self.halves[-1].add(tokens)
            self.changes += 1

    def __len__(self) -> int:
        """Tokens that are remembered, ends of sequences included."""
        with self.lock:
            return sum(half.length for half in self.halves)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        with self.lock:
            return sum(half.tokens.nbytes + half.automaton.nbytes for half in self.halves)


class CorpusMatch:
    """Where a context's end stands in a corpus, followed token by token."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._changes = -1
        self._places: list[tuple[int, int]] = []
        self._seen = np.empty(0, np.int64)
        self.length = 0
        self._source: tuple[_Half, int] | None = None

    def longest(self, context: Int64) -> "CorpusMatch":
        """Look the context up; `length` is that of the longest match, and `continuation` what followed it."""
        corpus = self._corpus
        with corpus.lock:
            known = len(self._seen)
            if corpus.changes != self._changes or not np.array_equal(self._seen, context[:known]):
                self._changes, known = corpus.changes, max(0, len(context) - _LOOKED_UP)
                self._places = [(0, 0)] * len(corpus.halves)
            self.length, self._source = 0, None
            for index, half in enumerate(corpus.halves):
                state, length = half.automaton.advance(*self._places[index], context[known:])
                self._places[index] = (state, length)
                found = half.automaton.successors(state, 1) if length > self.length else None
                if found is not None and len(found.ends) and found.tokens[0] != _SEPARATOR:
                    self.length, self._source = length, (half, int(found.ends[0]))
            self._seen = context.copy()
        return self

    def continuation(self, max_tokens: int) -> Int64:
        """What followed the longest match, to the end of its sequence at most: int64 [n]."""
        if self._source is None:
            return np.empty(0, np.int64)
        half, end = self._source
        with self._corpus.lock:
            copied = half.tokens[end : min(end + max_tokens, half.length)].astype(np.int64)
        ends = np.flatnonzero(copied == _SEPARATOR)
        return copied[: ends[0]] if len(ends) else copied
