"""Prompt lookup on golden sequences, and against a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar.errors import GenerationError
from runtime.drafters import PromptLookup

contexts = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def propose(context, k=5, **options):
    return PromptLookup(**options).propose(np.array(context, np.int64), k).tokens.tolist()


@pytest.mark.parametrize(
    ("context", "latest", "earliest"),
    [
        # [1 2 3] stood at 0 and at 5: the latest continuation, or the first.
        ([1, 2, 3, 7, 8, 1, 2, 3, 9, 9, 1, 2, 3], [9, 9, 1, 2, 3], [7, 8, 1, 2, 3]),
        # No trigram, but the bigram [4 5].
        ([4, 5, 6, 0, 4, 5], [6, 0, 4, 5, 6], [6, 0, 4, 5, 5]),
        # Only the last token stood before.
        ([3, 1, 2, 3], [1, 2, 3, 1, 2], [1, 2, 3, 3, 3]),
        # A loop of period 1 goes on; vLLM's matcher repeats the last token, which is the same here.
        ([6, 6, 6, 6], [6, 6, 6, 6, 6], [6, 6, 6, 6, 6]),
        # A loop of period 2 goes on; the earliest match has the loop before it.
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1], [1, 2, 2, 2, 2]),
        ([1, 2, 3], [], []),
        ([1], [], []),
    ],
)
def test_golden_sequences(context, latest, earliest):
    assert propose(context) == latest
    assert propose(context, match="earliest") == earliest


def test_shorter_matches_can_be_ruled_out():
    assert propose([3, 1, 2, 3], min_ngram=2) == []
    assert propose([1, 2, 9, 8, 1, 2], min_ngram=2) == [9, 8, 1, 2, 9]


def test_no_more_than_asked_for():
    assert propose([1, 2, 1], k=0) == []
    assert propose([1, 2, 1], k=1) == [2]


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (3, 0), (0, 0)])
def test_ngram_sizes_that_make_no_sense(longest, shortest):
    with pytest.raises(GenerationError, match="1 <= min_ngram <= max_ngram was expected"):
        PromptLookup(max_ngram=longest, min_ngram=shortest)


def slow(context, k, *, latest):
    for size in range(min(3, len(context) - 1), 0, -1):
        starts = [i for i in range(len(context) - size) if context[i : i + size] == context[-size:]]
        if starts:
            follower = starts[-1 if latest else 0] + size
            sequence = list(context)
            for step in range(k):
                at = follower + step
                sequence.append(sequence[at] if latest else context[min(at, len(context) - 1)])
            return sequence[len(context) :]
    return []


@given(contexts, st.integers(0, 8))
def test_equals_the_slow_reference(context, k):
    assert propose(context, k) == (slow(context, k, latest=True) if k else [])
    assert propose(context, k, match="earliest") == (slow(context, k, latest=False) if k else [])
