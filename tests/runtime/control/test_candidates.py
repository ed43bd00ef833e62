"""Drafts as one tree, and the part of it that pays, against every part that could be chosen."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.acceptance import follow
from runtime.control.candidates import judged, merge, select, to_draft
from runtime.control.latency import Latencies
from runtime.drafters import Draft

quick = settings(deadline=None, max_examples=150, database=None, derandomize=True)


def draft(tokens, parents=None, evidence=None):
    def array(values):
        return None if values is None else np.array(values, np.int64)

    return Draft(tokens=np.array(tokens, np.int64), parents=array(parents), evidence=array(evidence))


def paths(tokens, parents):
    """The tokens from the pending one down to each."""
    found = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(() if parent == -1 else found[parent]), token))
    return found


def parents_of(one):
    return range(-1, len(one.tokens) - 1) if one.parents is None else one.parents.tolist()


@st.composite
def drafts(draw, most=7):
    """A chain or a tree of three tokens, with evidence or without; siblings are different tokens."""
    tokens, parents = [], []
    chain = draw(st.booleans())
    for _ in range(draw(st.integers(0, most))):
        parent = len(tokens) - 1 if chain else draw(st.integers(-1, len(tokens) - 1))
        taken = {token for token, above in zip(tokens, parents, strict=True) if above == parent}
        free = sorted({0, 1, 2} - taken)
        if free:
            tokens.append(draw(st.sampled_from(free)))
            parents.append(parent)
        elif chain:
            break
    if len(tokens) != len(parents) or (chain and parents != list(range(-1, len(tokens) - 1))):
        raise AssertionError
    evidence = draw(st.lists(st.integers(100, 104), min_size=len(tokens), max_size=len(tokens)))
    return draft(tokens, None if chain else parents, evidence if draw(st.booleans()) else None)


class TestMerge:
    @quick
    @given(st.lists(drafts(), max_size=3))
    def test_is_the_union_of_paths(self, proposed):
        expected = {}
        for drafter, one in enumerate(proposed):
            for node, path in enumerate(paths(one.tokens.tolist(), parents_of(one))):
                rests_on = len(path) - 1 if one.evidence is None else int(one.evidence[node])
                if path not in expected:
                    expected[path] = [drafter, rests_on, False]
                elif expected[path][0] != drafter:
                    expected[path][2] = True
        found = merge(proposed)
        places = paths(found.tokens, found.parents)
        assert all(parent < place for place, parent in enumerate(found.parents))
        assert len(places) == len(expected)
        said = zip(found.drafters, found.evidence, found.seconded, strict=True)
        assert {path: list(one) for path, one in zip(places, said, strict=True)} == expected
        # Of every place and last of the pending token, what follows it.
        assert len(found.children) == len(found.tokens) + 1
        for place in range(-1, len(found.tokens)):
            below = [child for child, parent in enumerate(found.parents) if parent == place]
            assert found.children[place] == below

    def test_two_chains_that_part(self):
        found = merge([draft([1, 2, 3], evidence=[7, 8, 9]), draft([1, 2, 4, 5])])
        assert found.tokens == [1, 2, 3, 4, 5]
        assert found.parents == [-1, 0, 1, 1, 3]
        assert found.drafters == [0, 0, 0, 1, 1]
        # The first drafter's evidence stays; what says nothing rests on its depth.
        assert found.evidence == [7, 8, 9, 2, 3]
        assert found.seconded == [True, True, False, False, False]
        assert found.children == [[1], [2, 3], [], [4], [], [0]]

    def test_a_drafter_does_not_second_itself(self):
        found = merge([draft([1, 1], parents=[-1, -1])])
        assert found.tokens == [1]
        assert found.seconded == [False]

    @pytest.mark.parametrize("proposed", [[], [draft([])], [draft([]), draft([], parents=[])]])
    def test_of_nothing(self, proposed):
        found = merge(proposed)
        assert (found.tokens, found.children) == ([], [[]])


def reached(found, rates):
    """Of every candidate, the probability that it and all above it are right."""
    products = []
    for place, parent in enumerate(found.parents):
        products.append(rates[place] * (1.0 if parent == -1 else products[parent]))
    return products


def closed_subsets(found, most):
    places = range(len(found.tokens))
    for size in range(min(most, len(found.tokens)) + 1):
        for subset in itertools.combinations(places, size):
            if all(found.parents[place] in (-1, *subset) for place in subset):
                yield subset


def is_chain(found, subset):
    return all(found.parents[place] == above for above, place in itertools.pairwise((-1, *subset)))


def best_rate(found, rates, seconds, most, *, chains=False):
    products = reached(found, rates)
    return max(
        (1 + sum(products[place] for place in subset)) / seconds[len(subset)]
        for subset in closed_subsets(found, most)
        if not chains or is_chain(found, subset)
    )


probabilities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
STEPS = {
    "rising": st.floats(0, 0.6),
    "flat and steep": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    "falling, too": st.floats(-0.06, 0.3),
}


@st.composite
def with_latencies(draw, steps):
    """Candidates, their rates and the seconds of passes with 0 drafts and more."""
    found = merge([draw(drafts(5)), draw(drafts(4))])
    rates = draw(st.lists(probabilities, min_size=len(found.tokens), max_size=len(found.tokens)))
    seconds = list(itertools.accumulate(draw(st.lists(STEPS[steps], min_size=9, max_size=9)), initial=1.0))
    return found, rates, seconds


class TestSelect:
    @pytest.mark.parametrize("steps", STEPS)
    @quick
    @given(st.data(), st.integers(0, 12))
    def test_no_part_of_the_tree_is_better(self, steps, data, most):
        found, rates, seconds = data.draw(with_latencies(steps))
        chosen = select(found, rates.__getitem__, Latencies(seconds), most=most, tree=True)
        assert len(chosen.chosen) == len(set(chosen.chosen)) <= most
        for node, place in enumerate(chosen.chosen):
            assert found.parents[place] in (-1, *chosen.chosen[:node])
        products = reached(found, rates)
        assert chosen.tokens == pytest.approx(1 + sum(products[place] for place in chosen.chosen))
        assert chosen.seconds == seconds[len(chosen.chosen)]
        best = best_rate(found, rates, seconds, min(most, len(seconds) - 1))
        assert chosen.tokens / chosen.seconds == pytest.approx(best)

    @pytest.mark.parametrize("steps", STEPS)
    @quick
    @given(st.data(), st.integers(0, 12))
    def test_no_chain_is_better_where_siblings_are_not_verified(self, steps, data, most):
        found, rates, seconds = data.draw(with_latencies(steps))
        chosen = select(found, rates.__getitem__, Latencies(seconds), most=most, tree=False)
        assert len(chosen.chosen) <= most
        assert is_chain(found, chosen.chosen)
        products = reached(found, rates)
        assert chosen.tokens == pytest.approx(1 + sum(products[place] for place in chosen.chosen))
        assert chosen.seconds == seconds[len(chosen.chosen)]
        best = best_rate(found, rates, seconds, min(most, len(seconds) - 1), chains=True)
        assert chosen.tokens / chosen.seconds == pytest.approx(best)

    def test_of_two_chains_the_better_one_is_taken(self):
        """The likelier first token does not lead to the likelier chain."""
        found = merge([draft([1, 2, 3]), draft([4, 5, 6])])
        rates = [0.5, 0.1, 0.1, 0.45, 0.95, 0.95]
        latencies = Latencies([1.0, 1.1, 1.2, 1.3])
        assert select(found, rates.__getitem__, latencies, most=3, tree=False).chosen == [3, 4, 5]

    @quick
    @given(st.data(), st.integers(0, 12))
    def test_of_one_chain_the_best_beginning_is_taken(self, data, most):
        found = merge([draft(list(range(data.draw(st.integers(0, 7)))))])
        rates = data.draw(st.lists(probabilities, min_size=7, max_size=7))
        seconds = list(itertools.accumulate(data.draw(st.lists(st.floats(0, 0.6), min_size=9, max_size=9)), initial=1))
        for tree in (False, True):
            chosen = select(found, rates.__getitem__, Latencies(seconds), most=most, tree=tree)
            assert chosen.chosen == list(range(len(chosen.chosen)))
            assert chosen.tokens / chosen.seconds == pytest.approx(best_rate(found, rates, seconds, most))

    def test_a_step_that_pays_only_with_those_after_it(self):
        """The second draft takes as long as a pass; four take no longer, as where kernels work in blocks."""
        found = merge([draft([1, 2, 3, 4])])
        blocks = Latencies([1.0, 1.5, 1.5, 1.5, 1.5])
        assert select(found, lambda place: 0.3, blocks, most=9, tree=True).chosen == []
        assert select(found, lambda place: 0.4, blocks, most=9, tree=True).chosen == [0, 1, 2, 3]
        # Not as far as that is allowed: 0.4 + 0.16 of a token for half a pass.
        assert select(found, lambda place: 0.4, blocks, most=2, tree=True).chosen == [0, 1]
        assert select(found, lambda place: 0.4, blocks, most=1, tree=True).chosen == []

    def test_nothing_where_nothing_pays(self):
        found = merge([draft([1, 2, 3])])
        chosen = select(found, lambda place: 0.9, Latencies([1.0, 2.0, 3.0, 4.0]), most=3, tree=True)
        assert (chosen.chosen, chosen.tokens, chosen.seconds) == ([], 1.0, 1.0)
        for nothing, most in ((merge([]), 3), (found, 0)):
            chosen = select(nothing, lambda place: 1.0, Latencies([1.0, 1.0, 1.0, 1.0]), most=most, tree=True)
            assert (chosen.chosen, chosen.tokens, chosen.seconds) == ([], 1.0, 1.0)

    def test_all_where_drafts_take_no_time(self):
        found = merge([draft([1, 2]), draft([3, 4], parents=[-1, -1])])
        assert sorted(select(found, lambda place: 0.1, Latencies([1.0] * 9), most=9, tree=True).chosen) == [0, 1, 2, 3]

    def test_no_more_than_there_are_latencies_for(self):
        found = merge([draft([1, 2, 3, 4])])
        assert select(found, lambda place: 1.0, Latencies([1.0, 1.1, 1.2]), most=9, tree=True).chosen == [0, 1]


@quick
@given(st.lists(drafts(), max_size=3), st.data())
def test_to_draft_keeps_the_paths(proposed, data):
    found = merge(proposed)
    places = paths(found.tokens, found.parents)
    subset = data.draw(st.sampled_from(list(closed_subsets(found, 4))))
    made = to_draft(found, subset)
    assert paths(made.tokens.tolist(), parents_of(made)) == [places[place] for place in subset]
    assert (made.parents is None) == is_chain(found, subset)
    assert made.tokens.dtype == np.int64
    assert made.parents is None or made.parents.dtype == np.int64


@quick
@given(st.lists(drafts(), max_size=3), st.lists(st.integers(0, 2), max_size=8))
def test_judged_is_what_the_sequence_decides_about(proposed, emitted):
    """A candidate is decided about where the sequence goes along all that it follows, verified or not."""
    found = merge(proposed)
    expected = {}
    for place, path in enumerate(paths(found.tokens, found.parents)):
        if len(path) <= len(emitted) and list(path[:-1]) == emitted[: len(path) - 1]:
            expected[place] = path[-1] == emitted[len(path) - 1]
    verdicts = judged(found, emitted)
    assert dict(verdicts) == expected
    assert len(verdicts) == len(expected)


@quick
@given(drafts(), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_what_is_right_is_what_the_loop_accepts(one, sequence):
    """Along a draft's own path, `judged` and `follow` agree."""
    found = merge([one])
    step, node, accepted = follow(one.tokens, one.parents), 0, 0
    for token in sequence:
        node = step(node, token)
        if node is None:
            break
        accepted += 1
    assert sum(right for _, right in judged(found, sequence)) == accepted
