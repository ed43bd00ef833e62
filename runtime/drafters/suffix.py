"""Suffix: what followed the longest suffix of the context that stood in it before, the most frequent first.

A suffix automaton (SAM decoding, arXiv 2411.10666) finds the longest match at a few microseconds a token, whatever its
length; an optional corpus of other sequences is searched the same way.
"""

import functools
from bisect import bisect_right

import numpy as np

from plugins.cpu.suffix_automaton import open_automaton
from quasar.errors import GenerationError
from runtime.drafters.base import NO_DRAFT, Draft, Int64
from runtime.drafters.corpus import Corpus, CorpusMatch

# Matches of so many tokens and more, up to the next bound, are taken together in what a guess rests on.
_LENGTH_BOUNDS = (1, 2, 3, 4, 6, 9, 17)
# The same for the share of the earlier places that went on with this token; one place alone is a kind of its own.
_SHARE_BOUNDS = (0.34, 0.67, 0.999)
_ONCE = len(_SHARE_BOUNDS) + 1
_SHARES = _ONCE + 1
# After its first token a draft is a copy; how often that is right goes by the match and the copied tokens together.
_COPIED = _SHARES * (len(_LENGTH_BOUNDS) + 1)
_FROM_CORPUS = 2 * _COPIED
# Rates on half of the development prompts (docs/drafters.md, "Constants"): by length, and by share.
_LENGTH_PRIORS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85)
_SHARE_PRIORS = (0.2, 0.5, 0.8, 1.0, 0.9)
# A branch after the first is copied so far, and at most for a third of the draft.
_BRANCH_TOKENS, _MOST_BRANCHES = 4, 3


class Suffix:
    """Copies what followed the match, as prompt lookup's "latest" does, from each of the likeliest `branches` places.

    One object follows one sequence at a time: given another, it begins again.
    """

    name = "suffix"

    def __init__(self, *, branches: int = 1, corpus: Corpus | None = None) -> None:
        """Make one.

        Args:
            branches: 1 drafts a chain; more, up to 3, a tree, for engines on which trees are exact.
            corpus: other sequences to copy from where they match longer. What is drafted, and so how long an answer
                takes, then depends on them: share one only between sequences that may know of each other.
        """
        if not 1 <= branches <= _MOST_BRANCHES:
            raise GenerationError(f"branches is {branches}; 1 to {_MOST_BRANCHES} was expected")
        self._branches = branches
        self._automaton = open_automaton()
        self._tokens = np.empty(0, np.int64)
        self._corpus = None if corpus is None else CorpusMatch(corpus)

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        if max_tokens <= 0:
            return NO_DRAFT
        self._follow(context)
        state, length = self._automaton.match()
        if self._corpus is not None:
            other = self._corpus.longest(context)
            if other.length > length:
                copied = other.continuation(max_tokens)
                return Draft(tokens=copied, evidence=_evidence(other.length, _SHARES - 1, len(copied)) + _FROM_CORPUS)
        if not length:
            return NO_DRAFT
        found = self._automaton.successors(state, self._branches)
        # The end of the context is a place of the match, too, that nothing follows yet.
        places = self._automaton.count(state) - 1
        drafts = []
        sizes = _sizes(max_tokens, len(found.tokens))
        for size, count, end in zip(sizes, found.counts.tolist(), found.ends.tolist(), strict=False):
            copied = context[end : end + size].copy()
            if len(copied) < size:
                # It runs into the end of the context, and goes on with itself.
                copied = np.resize(copied, size)
            drafts.append(Draft(tokens=copied, evidence=_evidence(length, _share(count, places), size)))
        return drafts[0] if len(drafts) == 1 else _tree(drafts)

    def prior(self, evidence: int) -> float:
        """The probability of a guess, before any was seen."""
        kind = evidence % _FROM_CORPUS
        if kind >= _COPIED:
            return _LENGTH_PRIORS[kind - _COPIED]
        return _LENGTH_PRIORS[kind // _SHARES] * _SHARE_PRIORS[kind % _SHARES]

    def _follow(self, context: Int64) -> None:
        """Bring the automaton up to the context."""
        known = len(self._automaton)
        if known > len(context) or not (self._tokens[:known] == context[:known]).all():
            self._automaton.clear()
            known = 0
        if len(self._tokens) < len(context):
            grown = np.empty(2 * len(context), np.int64)
            grown[:known] = self._tokens[:known]
            self._tokens = grown
        self._tokens[known : len(context)] = context[known:]
        self._automaton.extend(context[known:])


def _sizes(max_tokens: int, branches: int) -> list[int]:
    """Tokens of each branch: the first one gets what the others leave."""
    other = min(_BRANCH_TOKENS, max_tokens // 3)
    others = [other] * (branches - 1) if other else []
    return [max_tokens - sum(others), *others]


def _evidence(length: int, share: int, count: int) -> Int64:
    """What the tokens of a copy rest on: int64 [count], read-only."""
    return _known_evidence(min(length, _LENGTH_BOUNDS[-1]), share, count)


@functools.cache
def _known_evidence(length: int, share: int, count: int) -> Int64:
    lengths = np.searchsorted(_LENGTH_BOUNDS, length + np.arange(count), side="right")
    evidence: Int64 = lengths + _COPIED
    if count:
        evidence[0] = lengths[0] * _SHARES + share
    evidence.setflags(write=False)
    return evidence


def _share(count: int, places: int) -> int:
    if places == 1:
        return _ONCE
    return bisect_right(_SHARE_BOUNDS, count / places)


def _tree(branches: list[Draft]) -> Draft:
    """Chains that begin with different tokens, as one tree."""
    return Draft(
        tokens=np.concatenate([branch.tokens for branch in branches]),
        parents=_parents(tuple(len(branch.tokens) for branch in branches)),
        evidence=np.concatenate([branch.evidence for branch in branches if branch.evidence is not None]),
    )


@functools.cache
def _parents(sizes: tuple[int, ...]) -> Int64:
    """Of chains of these sizes, one after the other: int64 [K], read-only."""
    parents = np.arange(-1, sum(sizes) - 1)
    parents[np.cumsum((0, *sizes[:-1]))] = -1
    parents.setflags(write=False)
    return parents
