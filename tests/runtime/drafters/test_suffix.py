"""Suffix against a look through the whole context, and against itself beginning anew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.suffix_automaton import SuffixAutomaton
from quasar.errors import GenerationError
from runtime.drafters import Corpus, PromptLookup, Suffix
from runtime.drafters.suffix import _COPIED, _FROM_CORPUS, _SHARES, _evidence, _share, _sizes

contexts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def array(tokens):
    return np.array(tokens, np.int64)


def columns(draft):
    parents = None if draft.parents is None else draft.parents.tolist()
    return draft.tokens.tolist(), parents, None if draft.evidence is None else draft.evidence.tolist()


def longest_match(context):
    """The length of the longest suffix that ended earlier, and the places after its earlier occurrences."""
    for size in range(len(context) - 1, 0, -1):
        places = [at for at in range(size, len(context)) if context[at - size : at] == context[-size:]]
        if places:
            return size, places
    return 0, []


def continuations(context, places):
    """First tokens of what followed, the most frequent first and then the most recent; with count and latest place."""
    found = {}
    for at in places:
        count, _ = found.get(context[at], (0, 0))
        found[context[at]] = (count + 1, at)
    return sorted(found.values(), reverse=True)


def copied(context, at, count):
    """What stands from a place on; after the context's end, the copy goes on with itself."""
    sequence = list(context)
    for step in range(count):
        sequence.append(sequence[at + step])
    return sequence[len(context) :]


def slow(context, k, branches):
    _, places = longest_match(context)
    found = continuations(context, places)[:branches]
    if not found:
        return []
    others = min(4, k // 3)
    sizes = [k - others * (len(found) - 1), *[others] * (len(found) - 1)]
    return [copied(context, at, size) for size, (_, at) in zip(sizes, found, strict=True) if size]


def chains(draft):
    """The branches of a draft, which begin where the parent is the pending token."""
    if draft.parents is None:
        return [draft.tokens.tolist()] if len(draft.tokens) else []
    found = []
    for place, (token, parent) in enumerate(zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True)):
        if parent == -1:
            found.append([])
        else:
            assert parent == place - 1
        found[-1].append(token)
    return found


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        # Five tokens match; what followed the most recent trigram alone would be 8.
        ([1, 2, 3, 4, 5, 6, 9, 3, 4, 5, 8, 1, 2, 3, 4, 5], [6, 9, 3, 4]),
        # 5 followed twice and 6, more recently, once.
        ([1, 5, 2, 1, 5, 3, 1, 6, 4, 1], [5, 3, 1, 6]),
        # Once each: the most recent.
        ([1, 5, 2, 1, 6, 4, 1], [6, 4, 1, 6]),
        # Loops of period 1 and 2 go on.
        ([6, 6, 6], [6, 6, 6, 6]),
        ([1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_golden_sequences(context, expected):
    assert Suffix().propose(array(context), 4).tokens.tolist() == expected


@given(contexts, st.integers(0, 12), st.sampled_from([1, 2, 3]))
def test_equals_the_slow_reference(context, k, branches):
    draft = Suffix(branches=branches).propose(array(context), k)
    assert chains(draft) == (slow(context, k, branches) if k else [])


@given(contexts, st.integers(1, 31), st.sampled_from([2, 3]))
def test_branches(context, k, branches):
    draft = Suffix(branches=branches).propose(array(context), k)
    found = chains(draft)
    sizes = [len(branch) for branch in found]
    assert sum(sizes) == len(draft.tokens) <= k
    # As many as were asked for, if anything is drafted: none is withheld.
    assert sum(sizes) in (0, k)
    assert len(found) <= branches
    assert sizes[:1] == ([max(sizes)] if sizes else [])
    assert len({branch[0] for branch in found}) == len(found)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", range(1, 32))
def test_sizes_of_branches(max_tokens, branches):
    sizes = _sizes(max_tokens, branches)
    assert sum(sizes) == max_tokens
    assert sizes[0] == max(sizes)
    assert min(sizes) > 0
    assert len(sizes) == (branches if max_tokens >= 3 else 1)


def test_the_reference_automaton_drafts_the_same(monkeypatch):
    random = np.random.default_rng(1)
    contexts = [random.integers(0, 3, size) for size in (2, 9, 40, 200)]
    native = [columns(Suffix(branches=3).propose(context, 9)) for context in contexts]
    monkeypatch.setattr("runtime.drafters.suffix.open_automaton", SuffixAutomaton)
    assert [columns(Suffix(branches=3).propose(context, 9)) for context in contexts] == native


def test_a_loop_of_thousands_goes_on():
    """More occurrences than the automaton counts exactly."""
    context = np.arange(4000) % 3
    draft = Suffix(branches=2).propose(context, 6)
    assert draft.tokens.tolist() == [1, 2, 0, 1, 2, 0]
    assert 0 < Suffix().prior(int(draft.evidence[0])) <= 1


def test_nothing_is_drafted_where_nothing_is_asked_for():
    assert len(Suffix().propose(array([1, 1]), 0).tokens) == 0
    assert len(Suffix().propose(array([1, 1]), -1).tokens) == 0


@given(contexts, st.integers(1, 31), st.sampled_from([1, 3]))
def test_what_guesses_rest_on(context, k, branches):
    drafter = Suffix(branches=branches)
    draft = drafter.propose(array(context), k)
    if not len(draft.tokens):
        return
    size, places = longest_match(context)
    expected = []
    for (count, _), branch in zip(continuations(context, places), chains(draft), strict=False):
        share = _share(count, len(places))
        assert (share == _SHARES - 1) == (len(places) == 1)
        expected += _evidence(size, share, len(branch)).tolist()
    assert draft.evidence.tolist() == expected
    assert draft.evidence.max() < _FROM_CORPUS


def test_evidence_tells_matches_apart():
    assert [int(_evidence(length, 0, 1)[0]) // _SHARES for length in (1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 900)] == [
        *(1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7)
    ]
    # A third, two thirds, almost all and all of several places; one place alone is a kind of its own.
    assert [_share(*part) for part in ((1, 3), (1, 2), (2, 3), (3, 4), (999, 1000), (2, 2), (1, 1))] == [
        *(0, 1, 1, 2, 3, 3, 4)
    ]
    # After the first, a token rests on the match and what was copied together.
    assert _evidence(2, 4, 9).tolist() == [14, 43, 44, 44, 45, 45, 45, 46, 46]
    assert _evidence(2, 4, 0).tolist() == []


def test_priors_of_all_evidence_that_can_occur():
    drafter = Suffix()
    alone = {int(one) for length in range(1, 40) for share in range(_SHARES) for one in _evidence(length, share, 31)}
    assert max(alone) < _FROM_CORPUS
    first = {one for one in alone if one < _COPIED}
    assert len(first) == 7 * _SHARES
    assert len(alone - first) == 6
    for one in alone:
        assert 0 < drafter.prior(one) <= 1
        assert drafter.prior(one + _FROM_CORPUS) == drafter.prior(one)
    for share in range(_SHARES):
        by_length = [drafter.prior(int(_evidence(length, share, 1)[0])) for length in range(1, 40)]
        assert by_length == sorted(by_length)
    by_share = [drafter.prior(int(_evidence(5, share, 1)[0])) for share in range(_SHARES - 1)]
    assert by_share == sorted(set(by_share))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.lists(st.integers(1, 9), min_size=1))
def test_following_a_sequence_is_beginning_anew(sequence, steps):
    follows = Suffix(branches=2)
    length = 0
    for step in steps:
        length = min(length + step, len(sequence))
        context = array(sequence[:length])
        assert columns(follows.propose(context, 7)) == columns(Suffix(branches=2).propose(context, 7))


@given(contexts, contexts, st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=8))
def test_one_object_serves_sequences_alternately(one, other, proposals):
    """Sequences that part, that are cut, and of which one is the beginning of the other."""
    serves = Suffix(branches=2)
    for of_other, length in proposals:
        context = array((other if of_other else one)[:length])
        assert columns(serves.propose(context, 7)) == columns(Suffix(branches=2).propose(context, 7))


def test_another_sequence_in_the_same_buffer_is_noticed():
    buffer = array([1, 2, 3, 1, 2, 3, 1])
    drafter = Suffix()
    assert drafter.propose(buffer[:6], 3).tokens.tolist() == [1, 2, 3]
    buffer[:] = [4, 5, 6, 4, 5, 6, 4]
    draft = drafter.propose(buffer, 3)
    assert draft.tokens.tolist() == [5, 6, 4]
    buffer[:] = 0
    assert draft.tokens.tolist() == [5, 6, 4]


def test_a_sequence_that_grows_is_read_once(monkeypatch):
    read = []

    class Counts(SuffixAutomaton):
        def extend(self, tokens):
            read.extend(tokens.tolist())
            super().extend(tokens)

    monkeypatch.setattr("runtime.drafters.suffix.open_automaton", Counts)
    drafter = Suffix()
    sequence = np.arange(300) % 11
    for length in range(5, 300, 7):
        drafter.propose(sequence[:length], 4)
    assert read == sequence[:length].tolist()


def test_agrees_with_prompt_lookup_where_the_match_is_one_place():
    random = np.random.default_rng(3)
    # Distinct tokens, then a piece of them again.
    for _ in range(30):
        sequence = random.permutation(50)
        at = int(random.integers(0, 45))
        context = np.concatenate([sequence, sequence[at : at + 3]])
        assert Suffix().propose(context, 8).tokens.tolist() == PromptLookup().propose(context, 8).tokens.tolist()


def test_a_longer_match_in_the_corpus_wins():
    corpus = Corpus()
    corpus.add([1, 2, 3, 9, 9, 9])
    drafter = Suffix(corpus=corpus)
    # The context repeats one token, the corpus has two of them.
    draft = drafter.propose(array([3, 5, 6, 2, 3]), 4)
    assert draft.tokens.tolist() == [9, 9, 9]
    assert draft.parents is None
    assert draft.evidence.tolist() == (_evidence(2, _SHARES - 1, 3) + _FROM_CORPUS).tolist()
    assert all(0 < drafter.prior(one) <= 1 for one in draft.evidence.tolist())
    # Of matches of equal length, the context's own.
    assert drafter.propose(array([2, 3, 5, 6, 2, 3]), 4).tokens.tolist() == [5, 6, 2, 3]
    assert drafter.propose(array([1, 2, 3, 5, 1, 2, 3]), 2).tokens.tolist() == [5, 1]
    # Nothing in the context, something in the corpus; and nothing anywhere.
    assert drafter.propose(array([3]), 2).tokens.tolist() == [9, 9]
    assert drafter.propose(array([4]), 2).tokens.tolist() == []


def test_without_a_longer_match_a_corpus_changes_nothing():
    corpus = Corpus()
    corpus.add([50, 51, 52])
    random = np.random.default_rng(5)
    for size in (1, 5, 60):
        context = random.integers(0, 4, size)
        assert columns(Suffix(branches=2, corpus=corpus).propose(context, 9)) == columns(
            Suffix(branches=2).propose(context, 9)
        )


@pytest.mark.parametrize("branches", [0, 4, -1])
def test_branches_that_there_are_not(branches):
    with pytest.raises(GenerationError, match=f"branches is {branches}; 1 to 3 was expected"):
        Suffix(branches=branches)
