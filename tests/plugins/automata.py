"""Suffix automata for tests: what a look through a sequence finds, and sequences of every kind."""

import numpy as np

from plugins.cpu import toolchain
from plugins.cpu.suffix_automaton import NativeSuffixAutomaton


def make_native():
    return NativeSuffixAutomaton(toolchain.LIBRARY)


def array(tokens):
    return np.array(tokens, np.int64)


def automaton_of(make, sequence):
    automaton = make()
    automaton.extend(array(sequence))
    return automaton


def ends_of(sequence, string):
    """Where a string ends in a sequence: the empty one after every token."""
    size = len(string)
    return [end for end in range(len(sequence)) if end + 1 >= size and sequence[end + 1 - size : end + 1] == string]


def strings_of(sequence):
    return sorted({sequence[start:end] for end in range(len(sequence) + 1) for start in range(end + 1)})


def check_integrity(automaton, sequence):
    """Every string of `sequence` tuple, and no other, is read from the root, and all that is said of it is true.

    The strings of a state are the suffixes of its longest one down to its link's longest: so lengths grow along
    transitions, and those of links are less.
    """
    assert len(automaton) == len(sequence)
    lengths = {0: {0}}
    reached = [((), 0)]
    strings = []
    while reached:
        string, state = reached.pop()
        strings.append(string)
        places = ends_of(sequence, string)
        assert automaton.count(state) == len(places)
        tokens, states, counts, ends = automaton.successors(state, 1000)
        followers = sorted(
            {sequence[end + 1] for end in places if end + 1 < len(sequence)} | set(sequence if not string else ())
        )
        found = {token: ends_of(sequence, (*string, token)) for token in followers}
        order = sorted(followers, key=lambda token: (-len(found[token]), -found[token][-1]))
        assert tokens.tolist() == order
        assert counts.tolist() == [len(found[token]) for token in order]
        assert ends.tolist() == [found[token][-1] for token in order]
        assert all(values.dtype == np.int64 for values in (tokens, states, counts, ends))
        for token, target in zip(tokens.tolist(), states.tolist(), strict=True):
            lengths.setdefault(target, set()).add(len(string) + 1)
            reached.append(((*string, token), target))
    assert sorted(strings) == strings_of(sequence)
    for state, sizes in lengths.items():
        link, length = automaton.shorter(state)
        if state:
            assert sizes == set(range(length + 1, max(sizes) + 1))
            assert max(lengths[link]) == length
            assert link == 0 or automaton.count(link) > automaton.count(state)
        else:
            assert (link, length) == (0, 0)
    return lengths


def sample_sequences(count, seed=0):
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 49153)
    zipf = random.choice(49152, count, p=weights / weights.sum())
    fibonacci = [0], [0, 1]
    while len(fibonacci[1]) < count:
        fibonacci = fibonacci[1], fibonacci[1] + fibonacci[0]
    half = random.integers(0, 3, count // 2)
    return {
        "zipf": zipf,
        "two": random.integers(0, 2, count),
        "many": random.integers(0, 50_000, count),
        "few often": random.integers(0, max(2, count // 40), count) * 7919,
        "repeated": np.concatenate([half, half]),
        "one": np.zeros(count, np.int64),
        "period": np.arange(count) % 7,
        "fibonacci": array(fibonacci[1][:count]),
        # The most states, and, with another token after it, the most transitions.
        "a b…b c": array([0] + [1] * (count - 2) + [2]),
        "distinct": np.arange(count),
        "largest ids": random.integers(2**31 - 300, 2**31, count),
    }
