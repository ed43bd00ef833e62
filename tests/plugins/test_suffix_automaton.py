"""The suffix automaton, reference and compiled, against what a look through the sequence finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.suffix_automaton import COUNTED_LINKS, MOST_TOKENS, SuffixAutomaton
from quasar.errors import GenerationError
from tests.plugins.automata import array, automaton_of, check_integrity, ends_of, make_native, strings_of
from tests.plugins.cpu.operators import needs_library


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_library)])
def make(request):
    """Makes an empty automaton."""
    return SuffixAutomaton if request.param == "reference" else make_native


def longest_suffix(string, sequence):
    sizes = range(len(string) + 1)
    return max(size for size in sizes if not size or ends_of(sequence, string[len(string) - size :]))


sequences = st.integers(1, 4).flatmap(lambda symbols: st.lists(st.integers(0, symbols - 1), max_size=24).map(tuple))
quick = settings(deadline=None, max_examples=120, database=None, derandomize=True)


def test_it_holds_the_strings_of_a_text(make):
    @quick
    @given(sequence=sequences)
    def check(sequence):
        automaton = automaton_of(make, sequence)
        lengths = check_integrity(automaton, sequence)
        assert len(lengths) <= max(2, 2 * len(sequence))
        for string in strings_of(sequence):
            state, length = automaton.find(array(string))
            assert length == len(string)
            assert length in lengths[state]
            # Strings that end at the same places share a state.
            assert automaton.count(state) == len(ends_of(sequence, string))

    check()


def test_it_matches_the_longest_suffix_that_was_there_before(make):
    @quick
    @given(sequence=sequences)
    def check(sequence):
        automaton = make()
        assert automaton.match() == (0, 0)
        for end in range(1, len(sequence) + 1):
            automaton.extend(array(sequence[end - 1 : end]))
            state, length = automaton.match()
            expected = max(
                size for size in range(end) if not size or len(ends_of(sequence[:end], sequence[end - size : end])) > 1
            )
            assert length == expected
            assert automaton.count(state) == len(ends_of(sequence[:end], sequence[end - length : end]))
        assert automaton.match() == automaton_of(make, sequence).match()

    check()


def test_it_finds_the_longest_suffix_of_other_tokens(make):
    @quick
    @given(sequence=sequences, query=sequences, split=st.integers(0, 24))
    def check(sequence, query, split):
        automaton = automaton_of(make, sequence)
        state, length = automaton.find(array(query))
        assert length == longest_suffix(query, sequence)
        assert (state, length) == automaton.find(array(query[len(query) - length :]))
        assert (state, length) == automaton.advance(*automaton.find(array(query[:split])), array(query[split:]))

    check()


def test_a_place_is_followed_while_the_text_grows(make):
    @quick
    @given(sequence=sequences, later=sequences, query=sequences, more=sequences)
    def check(sequence, later, query, more):
        automaton = automaton_of(make, sequence)
        place = automaton.find(array(query))
        automaton.extend(array(later))
        held = query[len(query) - place[1] :]
        assert automaton.advance(*place, array(())) == automaton.find(array(held))
        assert automaton.advance(*place, array(more)) == automaton.find(array(held + more))

    check()


def test_pieces_of_a_text_are_the_text(make):
    @quick
    @given(sequence=sequences, cuts=st.lists(st.integers(0, 24), max_size=4))
    def check(sequence, cuts):
        automaton = make()
        edges = [0, *sorted(cuts), len(sequence)]
        for start, end in itertools.pairwise(edges):
            automaton.extend(array(sequence[start:end]))
        check_integrity(automaton, sequence)

    check()


def test_counts_end_with_64_links(make):
    """A run of one token: the strings at its end are more and more links away."""
    automaton = automaton_of(make, [3] * 200)
    assert automaton.match() == (398, 199)
    for length in (199, 180, 137, 136, 135, 100, 1):
        state, found = automaton.find(array([3] * length))
        assert found == length
        # It ended with every token from its own length on.
        assert automaton.count(state) == min(200 - length, COUNTED_LINKS) + 1
        end = min(199, length - 1 + COUNTED_LINKS)
        if length > 1:
            assert automaton.successors(automaton.shorter(state)[0], 1).ends.tolist() == [end]


def test_what_it_says_of_a_text(make):
    """to be or not to be that is: "to be" was followed by 2 and by 4, the latter more recently."""
    automaton = automaton_of(make, [0, 1, 2, 3, 0, 1, 4, 5, 0, 1])
    state, length = automaton.match()
    assert (length, automaton.count(state)) == (2, 3)
    tokens, states, counts, ends = automaton.successors(state, 8)
    assert (tokens.tolist(), counts.tolist(), ends.tolist()) == ([4, 2], [1, 1], [6, 2])
    assert automaton.successors(int(states[0]), 8).tokens.tolist() == [5]
    assert automaton.successors(state, 1).tokens.tolist() == [4]
    assert automaton.shorter(state) == (0, 0)
    assert automaton.successors(0, 2)._asdict().keys() == {"tokens", "states", "counts", "ends"}
    assert automaton.successors(0, 2).counts.tolist() == [3, 3]
    assert automaton.count(0) == len(automaton) == 10


def test_automata_are_independent_and_can_be_cleared(make):
    first, second = make(), make()
    first.extend(array([1, 2, 1, 2]))
    second.extend(array([7, 7]))
    assert (first.match()[1], second.match()[1]) == (2, 1)
    used = first.nbytes
    assert used > 0
    first.clear()
    assert (len(first), first.match(), first.find(array([1]))) == (0, (0, 0), (0, 0))
    assert second.match()[1] == 1
    for _ in range(3):
        first.extend(array([3, 3, 3]))
        check_integrity(first, (3, 3, 3))
        first.clear()
    assert first.nbytes <= used


def test_a_large_alphabet_after_one_string(make):
    """Every size that a state's edges can have, and tables of them."""
    followers = np.random.default_rng(2).permutation(3000) * 600_000
    sequence = np.empty(6000, np.int64)
    sequence[::2], sequence[1::2] = 7, followers + 8
    automaton = automaton_of(make, sequence)
    state, _length = automaton.find(array([7]))
    tokens, _states, counts, ends = automaton.successors(state, 10**6)
    assert tokens.tolist() == sequence[1::2][::-1].tolist()
    assert counts.tolist() == [1] * 3000
    assert ends.tolist() == list(range(5999, 0, -2))
    assert automaton.successors(state, 5).tokens.tolist() == tokens[:5].tolist()
    for token in sequence[1:400:2].tolist():
        assert automaton.find(array([7, token]))[1] == 2
        assert automaton.find(array([7, token + 1]))[1] == 0


@pytest.mark.parametrize("bad", [-1, 2**31, -(2**63), 2**63 - 1])
def test_ids_that_no_vocabulary_has(make, bad):
    automaton = automaton_of(make, [1, 2, 1])
    message = rf"^the token id {bad} came; 0 to 2147483647 was expected$"
    for call in (automaton.extend, automaton.find, lambda tokens: automaton.advance(0, 0, tokens)):
        with pytest.raises(GenerationError, match=message):
            call(array([1, 2147483647, bad, 1]))
    check_integrity(automaton, (1, 2, 1))


def test_tokens_of_another_type_or_shape(make):
    automaton = make()
    for tokens, given_as in ((np.zeros(2), r"float64 \[2\]"), (np.zeros((1, 2), np.int64), r"int64 \[1, 2\]")):
        for call in (automaton.extend, automaton.find):
            with pytest.raises(
                GenerationError, match=rf"^tokens are an array of {given_as}; int64 \[n\] was expected$"
            ):
                call(tokens)
    assert len(automaton) == 0


def test_more_tokens_than_it_holds(make):
    automaton = automaton_of(make, [4])
    message = r"^a sequence of 67108865 tokens came; a suffix automaton holds 67108864$"
    with pytest.raises(GenerationError, match=message):
        automaton.extend(np.zeros(MOST_TOKENS, np.int64))
    check_integrity(automaton, (4,))


@pytest.mark.parametrize("state", [-1, 1, 8, 9, 10**12])
def test_states_that_there_are_not(make, state):
    automaton = automaton_of(make, [1, 1, 1])
    calls = (
        automaton.shorter,
        automaton.count,
        lambda state: automaton.successors(state, 3),
        lambda state: automaton.advance(state, 1, array([1])),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"^state {state} came; this automaton has none of that id$"):
            call(state)


@pytest.mark.parametrize(("state", "length"), [(0, 1), (0, -1), (4, 0), (4, 3), (4, -1)])
def test_lengths_that_a_state_does_not_have(make, state, length):
    automaton = automaton_of(make, [1, 2, 1])
    message = f"^length {length} of state {state} came; it has no string of that length$"
    with pytest.raises(ValueError, match=message):
        automaton.advance(state, length, array([1]))


def test_arrays_that_are_not_contiguous(make):
    sequence = np.arange(40).reshape(10, 4) % 5
    automaton = make()
    automaton.extend(sequence[:, 1])
    automaton.extend(sequence[::-1, 2])
    check_integrity(automaton, (*sequence[:, 1].tolist(), *sequence[::-1, 2].tolist()))
