"""The corpus of `Suffix`: how much is remembered, and what is found in it."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quasar.errors import GenerationError
from runtime.drafters import Corpus
from runtime.drafters.corpus import _SEPARATOR, CorpusMatch

sequences = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8)


def array(tokens):
    return np.array(tokens, np.int64)


def corpus_of(sequences, max_tokens=1000):
    corpus = Corpus(max_tokens)
    for sequence in sequences:
        corpus.add(sequence)
    return corpus


def remembered(corpus):
    return [token for half in corpus.halves for token in half.tokens[: half.length].tolist()]


def look_up(corpus, context, max_tokens=5):
    match = CorpusMatch(corpus).longest(array(context))
    return match.length, match.continuation(max_tokens).tolist()


def slow(sequences, context, max_tokens):
    """A look through all sequences: the longest match, and what followed its most frequent, then most recent, use."""
    together = [token for sequence in sequences for token in [*sequence, _SEPARATOR]]
    for size in range(len(context), 0, -1):
        places = [at for at in range(size, len(together)) if together[at - size : at] == context[-size:]]
        if places:
            following = [together[at] for at in places]
            at = max(places, key=lambda at: (following.count(together[at]), at))
            if together[at] == _SEPARATOR:
                return 0, []
            end = together.index(_SEPARATOR, at)
            return size, together[at : min(end, at + max_tokens)]
    return 0, []


@given(sequences, st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 6))
def test_equals_the_slow_reference(sequences, context, max_tokens):
    assert look_up(corpus_of(sequences), context, max_tokens) == slow(sequences, context, max_tokens)


def test_matches_end_with_their_sequence():
    corpus = corpus_of([[1, 2, 3], [4, 5, 6]])
    assert look_up(corpus, [1, 2]) == (2, [3])
    # 3 stood at the end, and 4 at the beginning of the next sequence.
    assert look_up(corpus, [2, 3]) == (0, [])
    assert look_up(corpus, [3, 4]) == (1, [5, 6])
    assert look_up(corpus, [4], max_tokens=1) == (1, [5])
    assert look_up(corpus, [7]) == (0, [])
    assert look_up(Corpus(), [1]) == (0, [])


@given(st.lists(st.lists(st.integers(0, 99), max_size=14), max_size=12), st.integers(2, 24))
def test_the_newest_tokens_are_remembered_and_no_more_than_fit(sequences, max_tokens):
    corpus, capacity = Corpus(max_tokens), max_tokens // 2
    written = []
    for sequence in sequences:
        corpus.add(sequence)
        written += [*sequence, _SEPARATOR][-capacity:]
        kept = remembered(corpus)
        assert len(corpus) == len(kept) <= max_tokens
        assert kept == written[len(written) - len(kept) :]
        # At least half of what fits.
        assert len(kept) >= min(len(written), capacity)


def test_the_oldest_is_forgotten():
    corpus = Corpus(20)
    corpus.add([1, 2, 3, 4])
    corpus.add([5, 6, 7, 8])
    assert look_up(corpus, [1, 2]) == (2, [3, 4])
    corpus.add([9, 10, 11, 12])
    assert look_up(corpus, [1, 2]) == (2, [3, 4])
    assert look_up(corpus, [9]) == (1, [10, 11, 12])
    corpus.add([13, 14, 15, 16])
    corpus.add([17, 18])
    assert look_up(corpus, [1, 2]) == (0, [])
    assert look_up(corpus, [9]) == (1, [10, 11, 12])
    # Of a sequence that is longer than half, the end.
    corpus.add(range(30, 50))
    assert look_up(corpus, [48]) == (1, [49])
    assert look_up(corpus, [40]) == (0, [])


def test_of_two_halves_the_longer_match_and_then_the_older():
    corpus = Corpus(16)
    corpus.add([1, 2, 3, 4, 5])
    corpus.add([2, 3, 9, 9])
    assert len(corpus.halves) == 2
    assert look_up(corpus, [1, 2, 3]) == (3, [4, 5])
    assert look_up(corpus, [7, 2, 3]) == (2, [4, 5])
    corpus = Corpus(16)
    corpus.add([2, 3, 9, 9])
    corpus.add([1, 2, 3, 4, 5])
    assert look_up(corpus, [1, 2, 3]) == (3, [4, 5])


@given(sequences, st.lists(st.integers(0, 2), min_size=1, max_size=20), st.lists(st.integers(1, 5), min_size=1))
def test_following_a_sequence_is_looking_it_up_anew(sequences, context, steps):
    corpus = corpus_of(sequences, 40)
    follows = CorpusMatch(corpus)
    length = 0
    for step in steps:
        length = min(length + step, len(context))
        match = follows.longest(array(context[:length]))
        assert (match.length, match.continuation(5).tolist()) == look_up(corpus, context[:length])
    # A sequence that is none of its beginnings.
    match = follows.longest(array([context[0] ^ 1, *context]))
    assert (match.length, match.continuation(5).tolist()) == look_up(corpus, [context[0] ^ 1, *context])


def test_another_sequence_in_the_same_buffer_is_noticed():
    match = CorpusMatch(corpus_of([[1, 2, 3], [4, 5, 6]]))
    buffer = array([1, 2, 9])
    assert match.longest(buffer[:2]).continuation(5).tolist() == [3]
    buffer[:2] = [7, 4]
    assert match.longest(buffer[:2]).continuation(5).tolist() == [5, 6]


def test_a_match_survives_that_its_half_is_dropped():
    corpus = Corpus(12)
    corpus.add([1, 2, 3, 4])
    match = CorpusMatch(corpus).longest(array([1, 2]))
    for _ in range(3):
        corpus.add([7, 8, 9, 9, 9])
    assert match.continuation(5).tolist() == [3, 4]
    assert match.longest(array([1, 2])).length == 0
    assert match.continuation(5).tolist() == []
    assert match.longest(array([1, 2, 7])).continuation(2).tolist() == [8, 9]


def test_threads_share_a_corpus():
    """Sequences count upwards: whatever is copied must go on where the context ends."""
    corpus = Corpus(300)
    failures = []

    def write(seed):
        random = np.random.default_rng(seed)
        for _ in range(150):
            first = int(random.integers(0, 40))
            corpus.add(np.arange(first, first + int(random.integers(2, 40))))

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(60):
            match, context = CorpusMatch(corpus), np.arange(first := int(random.integers(0, 40)), first + 1)
            for _ in range(5):
                copied = match.longest(context).continuation(4)
                if copied.tolist() != list(range(context[-1] + 1, context[-1] + 1 + len(copied))) or len(corpus) > 300:
                    failures.append((context, copied))
                context = np.append(context, context[-1] + 1)

    def guarded(work, seed):
        try:
            work(seed)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work, seed)) for seed in range(3) for work in (write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert corpus.changes > 3


def test_memory_is_bounded():
    corpus = Corpus(2000)
    random = np.random.default_rng(2)
    sizes = []
    for _ in range(40):
        corpus.add(random.integers(0, 50, 200))
        sizes.append(corpus.nbytes)
    assert max(sizes[20:]) <= max(sizes[:20])
    assert 4 * len(corpus) < min(sizes[20:])


@pytest.mark.parametrize("max_tokens", [1, 0, -5])
def test_sizes_that_hold_nothing(max_tokens):
    with pytest.raises(GenerationError, match=f"max_tokens is {max_tokens}; 2 or more was expected"):
        Corpus(max_tokens)


def test_the_smallest_corpus_remembers_ends():
    corpus = Corpus(2)
    corpus.add([5, 6])
    assert len(corpus) == 1
    assert look_up(corpus, [5]) == (0, [])


@pytest.mark.parametrize(
    "sequence",
    [[-1], [1, _SEPARATOR], [1 << 40], [[1, 2], [3, 4]], 5, pytest.param([1 << 70], id="no int64")],
)
def test_sequences_that_are_none(sequence):
    corpus = Corpus()
    with pytest.raises(GenerationError, match="a sequence for the corpus must be a list of token ids, 0 to 2"):
        corpus.add(sequence)
    assert len(corpus) == 0


def test_the_largest_id_and_empty_sequences_are_taken():
    corpus = Corpus()
    corpus.add([])
    corpus.add((_SEPARATOR - 1, 3))
    corpus.add(array([4, 5]))
    assert look_up(corpus, [_SEPARATOR - 1]) == (1, [3])
    assert look_up(corpus, [4]) == (1, [5])


def test_sequences_that_come_while_a_context_is_followed():
    """Found at once, and a match that a sequence has made longer is followed in the new one."""
    corpus = Corpus()
    match = CorpusMatch(corpus)
    context = np.array([1, 2, 3])
    assert match.longest(context).length == 0
    corpus.add([9, 2, 3, 7])
    assert (match.longest(context).length, match.continuation(3).tolist()) == (2, [7])
    corpus.add([1, 2, 3, 4, 5])
    assert (match.longest(context).length, match.continuation(3).tolist()) == (3, [4, 5])
    assert match.longest(np.array([1, 2, 3, 4])).continuation(3).tolist() == [5]
    # Of a long context only the end is looked up anew.
    long = np.arange(100, 400)
    corpus.add(long)
    assert match.longest(long[:-5]).length == 64
    assert match.continuation(5).tolist() == long[-5:].tolist()
