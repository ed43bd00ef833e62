"""A drafter that follows a prediction: after edits the place is found again, and drafts are what the prediction has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.drafters.alignment import Alignment, Relation
from runtime.drafters.base import ask
from runtime.drafters.prediction import _LENGTHS, PredictedAnswer, Prediction

PROMPT = [5, 6, 7]
# Tokens of which each stands in a place or two, as words of code do.
TEXT = np.random.default_rng(3).integers(0, 60, 240).tolist()
# Tokens that an edit brings.
NEW = st.lists(st.integers(60, 90), min_size=1, max_size=12)


def array(tokens):
    return np.array(tokens, np.int64)


def drafter(prediction, *, trees=False):
    return Prediction(PredictedAnswer(tokens=array(prediction), begins=len(PROMPT)), trees=trees)


def proposed(one, answer, count=8, *, trees=False):
    return ask(one, array(PROMPT + answer), count, trees=trees)


def rounds_of(prediction, answer, count=8):
    """The drafts accepted in each round of an answer; every round has the target's own token besides."""
    one, place, accepted = drafter(prediction), 1, []
    while place < len(answer):
        draft = proposed(one, answer[:place], count).tokens.tolist()
        right = 0
        while right < len(draft) and place + right < len(answer) and draft[right] == answer[place + right]:
            right += 1
        accepted.append((place, right))
        place += right + 1
    return accepted


def test_it_copies_from_the_place_where_the_answer_is():
    one = drafter(TEXT)
    for place in (1, 2, 9, 200, 236):
        assert proposed(one, TEXT[:place]).tokens.tolist() == TEXT[place : place + 8]
    assert not len(proposed(one, TEXT).tokens)


def test_an_unchanged_text_is_drafted_whole():
    assert {right for place, right in rounds_of(TEXT, TEXT) if place < 220} == {8}


@settings(deadline=None)
@given(at=st.integers(12, 200), removed=st.integers(0, 12), inserted=st.one_of(st.just([]), NEW))
def test_after_an_insertion_deletion_or_replacement_the_place_is_found_within_a_few_tokens(at, removed, inserted):
    answer = TEXT[:at] + inserted + TEXT[at + removed :]
    after = at + len(inserted)
    rounds = list(rounds_of(TEXT, answer))
    # Before the edit everything is right; after it, once four tokens of the text came again.
    assert all(right == 8 for place, right in rounds if place + 8 <= at)
    wrong = [place for place, right in rounds if place >= after + 4 and place + 8 < len(answer) and right < 8]
    # A replacement is tried again where the old tokens come next, in vain here.
    assert len(wrong) <= bool(removed and inserted), wrong


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 6), NEW), min_size=1, max_size=4))
def test_several_edits_leave_most_of_the_text_to_be_copied(edits):
    answer, last = [], 0
    for line, removed, inserted in sorted(edits):
        start = max(last, 20 * line)
        answer += TEXT[last:start] + inserted
        last = start + removed
    answer += TEXT[last:]
    kept = sum(token < 60 for token in answer)
    accepted = sum(right for _, right in rounds_of(TEXT, answer))
    # Beside the target's own token of every round, an edit takes a few tokens of its own.
    assert accepted >= 8 / 9 * kept - 12 * len(edits) - 8


def test_of_like_places_the_nearest_after_the_cursor_is_taken():
    line = [1, 2, 3, 4]
    text = [*line, 10, *line, 11, *line, 12, *line, 13]
    # The second line was inserted anew; what follows 1 2 3 4 is that of the nearest.
    assert proposed(drafter(text), [*line, 10, 50, 1, 2, 3, 4], 1).tokens.tolist() == [11]
    one = drafter(text)
    assert proposed(one, [*line, 10, *line, 11, 1, 2], 4).tokens.tolist() == [3, 4, 12, 1]


def test_a_replacement_is_expected_again_until_it_is_not():
    text = [*range(20, 30), 1, *range(30, 40), 1, *range(40, 50), 1, *range(50, 58)]
    answer = [*range(20, 30), 7, 8, *range(30, 40)]
    one = drafter(text)
    assert proposed(one, answer, 4).tokens.tolist() == [7, 8, 40, 41]
    # On trees the text's own word stands beside it.
    tree = proposed(drafter(text, trees=True), answer, 9, trees=True)
    assert (tree.tokens.tolist()[:2], tree.parents.tolist()[:2]) == ([7, 8], [-1, 0])
    assert (tree.tokens.tolist()[6:], tree.parents.tolist()[6:]) == ([1, 40, 41], [-1, 6, 7])
    # Half of the replacement came: the other half is next.
    assert proposed(drafter(text), [*answer, 7], 3).tokens.tolist() == [8, 40, 41]
    # It was kept once: so it is no more expected.
    assert proposed(one, [*answer, 1, *range(40, 50)], 2).tokens.tolist() == [1, 50]


def test_trees_hold_the_second_place_and_siblings_differ():
    text = [1, 2, 9, 30, 31, 32, *range(40, 58), *([60] * 100), 2, 8, 33, 34, 35, 36]
    one = drafter(text, trees=True)
    draft = proposed(one, [1, 3, 2], 9, trees=True)
    firsts = [
        token for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True) if parent == -1
    ]
    assert firsts == [9, 30]


@pytest.mark.parametrize("prediction", [[], [99], [99] * 5000, list(range(100, 4000))], ids=["0", "1", "same", "long"])
def test_wrong_predictions_are_drafts_all_the_same(prediction):
    for trees in (False, True):
        one = drafter(prediction, trees=trees)
        for place in range(1, 60, 7):
            draft = proposed(one, TEXT[:place], 31, trees=trees)
            assert len(draft.tokens) <= 31
    if len(prediction) < 2:
        assert not len(draft.tokens) or prediction == [99]


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), min_size=1, max_size=60), st.booleans())
@settings(deadline=None)
def test_whatever_comes_the_drafts_are_drafts(prediction, answer, trees):
    """Few tokens, so that much is ambiguous: drafts are in form, evidence has a prior, and pieces change nothing."""
    one = drafter(prediction, trees=trees)
    for place in range(1, len(answer) + 1):
        draft = proposed(one, answer[:place], 10, trees=trees)
        whole = proposed(drafter(prediction, trees=trees), answer[:place], 10, trees=trees)
        assert (draft.tokens.tolist(), str(draft.parents)) == (whole.tokens.tolist(), str(whole.parents))
        assert set(draft.tokens.tolist()) <= {*prediction, *answer}
        if draft.evidence is not None:
            assert all(0 < one.prior(kind) <= 1 for kind in draft.evidence.tolist())
        if draft.parents is not None:
            paths = list(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))
            assert len(set(paths)) == len(paths)


def test_what_a_guess_rests_on_goes_by_match_and_by_what_came_lately():
    one = drafter(TEXT)
    first = one.prior(int(proposed(one, TEXT[:2]).evidence[0]))
    later = one.prior(int(proposed(one, TEXT[:100]).evidence[0]))
    assert later > first
    edited = [token if place % 6 else 70 for place, token in enumerate(TEXT)]
    other = drafter(TEXT)
    kinds = proposed(other, edited[:101]).evidence
    assert other.prior(int(kinds[0])) < later
    assert kinds[0] % _LENGTHS < _LENGTHS - 1


def test_an_alignment_of_nothing_has_no_place_that_goes_on():
    alignment = Alignment(array([]))
    alignment.push(3)
    assert alignment.places() == []
    other = Alignment(array([3, 4]))
    for token in (3, 4):
        other.push(token)
    [place] = other.places()
    assert (place.position, place.relation) == (2, Relation.FOLLOWED)
    assert other.ahead(place, 5) == ([], [], [])


def test_after_a_replacement_under_way_the_next_one_has_its_own_words_beside_it():
    """4 became 10 11 12, and again at the end: while that comes, what follows it is not where the cursor is."""
    prediction = [1, 2, 3, 4, 20, 5, 6, 7, 8, 20, 9, 20]
    answer = [1, 2, 3, 4, 10, 11, 12, 5, 6, 7, 8, 10]
    drafter = Prediction(PredictedAnswer(tokens=np.array(prediction), begins=0), trees=True)
    draft = drafter.propose(np.array(answer), 8)
    assert draft.tokens.tolist()[:6] == [11, 12, 9, 10, 11, 12]
    # Beside the second replacement, which follows 9, the prediction's own word.
    assert draft.tokens.tolist()[6:] == [20]
    assert draft.parents.tolist() == [-1, 0, 1, 2, 3, 4, 2]
    assert len(draft.evidence) == len(draft.tokens)
