"""Drafts under a grammar: what is forced comes first, what is forbidden is left out, the rest is the drafter's."""

import numpy as np
import pytest

from runtime.control.candidates import merge
from runtime.drafters import Draft
from runtime.drafters.base import NO_DRAFT, ObservingDrafter, SlowDrafter, ask, name_of
from runtime.grammar.drafts import ForcedTokens, guide
from tests.runtime.grammar.vocabulary_states import encode, start

GRAMMAR = ("lark", 'start: "the answer is " ("yes" | "no") "." /[a-z]+/')
CONTEXT = np.array([7, 8, 9], np.int64)


class Known:
    """Drafts what it is told, and remembers what it was asked."""

    def __init__(self, draft):
        self.draft, self.asked, self.observed = draft, [], []

    def propose(self, context, max_tokens):
        self.asked.append((context.tolist(), max_tokens))
        return self.draft


class Observing(Known):
    name = "watcher"

    def observe(self, tokens, successors):
        self.observed.append((tokens, successors))

    def prior(self, evidence):
        return 0.25 + evidence / 100


class Slow(Known):
    seconds_per_token = 0.5


def array(tokens):
    return np.array(tokens, np.int64)


def test_the_drafter_goes_on_after_what_is_forced():
    state = start(*GRAMMAR)
    forced = state.forced()
    own = encode(" yes.")
    drafter = Known(Draft(tokens=array(own)))
    [guided] = guide([drafter], state)
    draft = ask(guided, CONTEXT, 30, trees=False)
    assert draft.tokens.tolist() == [*forced, *own]
    assert draft.parents is None
    # Without evidence of its own a guess rests on its depth, counted from where the drafter began.
    assert draft.evidence.tolist() == [0] * len(forced) + list(range(len(own)))
    assert drafter.asked == [([7, 8, 9, *forced], 30 - len(forced))]


def test_where_there_is_no_room_for_more_the_drafter_is_not_asked():
    state, drafter = start(*GRAMMAR), Known(NO_DRAFT)
    [guided] = guide([drafter], state)
    for most in (1, len(state.forced())):
        assert ask(guided, CONTEXT, most, trees=False).tokens.tolist() == state.forced()[:most]
    assert drafter.asked == []


def test_a_tree_goes_on_after_what_is_forced():
    state = start(*GRAMMAR)
    forced, count = state.forced(), len(state.forced())
    yes, no, other = encode(" yes")[0], encode(" no")[0], encode("x")[0]
    tree = Draft(tokens=array([yes, other, no, other]), parents=array([-1, -1, -1, 1]), evidence=array([5, 6, 7, 8]))
    [guided] = guide([Known(tree)], state)
    draft = ask(guided, CONTEXT, 30, trees=True)
    assert draft.tokens.tolist() == [*forced, yes, no]
    assert draft.parents.tolist() == [*range(-1, count - 1), count - 1, count - 1]
    assert draft.evidence.tolist() == [0] * count + [5, 7]


def test_candidates_that_are_forced_are_the_grammars_own_and_certain():
    state = start(*GRAMMAR)
    own = encode(" yes.")
    [guided] = guide([Known(Draft(tokens=array(own)))], state)
    first = ForcedTokens(state)
    candidates = merge([one.propose(CONTEXT, 30) for one in (first, guided)])
    count = len(state.forced())
    assert candidates.tokens == [*state.forced(), *own]
    assert candidates.drafters == [0] * count + [1] * len(own)
    assert (first.name, first.prior(0)) == ("grammar", 1.0)


def test_without_forced_tokens_a_draft_is_cut_where_the_grammar_ends_it():
    state = start("regex", "[ab]{2}c?")
    ids = [encode(letter)[0] for letter in "abcb"]
    [guided] = guide([Known(Draft(tokens=array(ids)))], state)
    assert ask(guided, CONTEXT, 9, trees=False).tokens.tolist() == ids[:3]
    assert len(ForcedTokens(state).propose(CONTEXT, 9).tokens) == 0


def test_what_a_drafter_can_do_besides_it_can_do_under_a_grammar():
    state = start(*GRAMMAR)
    observing, slow, plain = guide([Observing(NO_DRAFT), Slow(NO_DRAFT), Known(NO_DRAFT)], state)
    assert (name_of(observing), name_of(slow), name_of(plain)) == ("watcher", "Slow", "Known")
    assert observing.prior(3) == 0.28
    # Where a drafter says nothing of itself, the controller has its own belief.
    assert getattr(plain, "prior", None) is None
    assert isinstance(slow, SlowDrafter)
    assert slow.seconds_per_token == 0.5
    assert not isinstance(plain, SlowDrafter)
    assert isinstance(observing, ObservingDrafter)
    observing.observe(array([1]), array([[2]]))
    plain.observe(array([1]), array([[2]]))
    assert len(observing._drafter.observed) == 1


@pytest.mark.parametrize(
    "draft",
    [
        Draft(tokens=np.zeros(2)),
        Draft(tokens=np.zeros((2, 1), np.int64)),
        Draft(tokens=array([1, 2]), parents=array([1, -1])),
        Draft(tokens=array([1, 2]), evidence=array([1])),
    ],
    ids=["floats", "two axes", "parents after children", "evidence of one"],
)
def test_what_is_no_draft_is_left_to_who_checks_it(draft):
    [guided] = guide([Known(draft)], start("regex", "[ab]+"))
    assert guided.propose(CONTEXT, 9) is draft
