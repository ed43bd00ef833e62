"""The controller: no drafts that do not pay, and those that do."""

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.drafters import Draft
from runtime.segment import NO_PROPOSAL
from tests.runtime.control.processes import (
    CHOOSY,
    FLAT,
    LAPTOP,
    STEEP,
    OnSurface,
    Script,
    follow_sequence,
    on_session,
    sequence_of,
)
from tests.runtime.test_loop import Oracle, Trees, expected, hashed


class TestLength:
    @pytest.mark.parametrize("surface", [FLAT, LAPTOP], ids=["flat", "laptop"])
    def test_a_drafter_that_is_always_wrong_is_left_alone(self, surface):
        sequence = sequence_of(600)
        control = follow_sequence(sequence, [Script(sequence, 0.0)], surface)
        assert control.drafted[0] > 0
        assert control.drafted[-200:] == [0] * 200

    @pytest.mark.parametrize("surface", [FLAT, LAPTOP], ids=["flat", "laptop"])
    def test_a_drafter_that_is_always_right_drafts_long(self, surface):
        sequence = sequence_of(20_000)
        control = follow_sequence(sequence, [Script(sequence, 1.0)], surface)
        # The last rounds end with the sequence.
        assert control.drafted[-30:-2] == [31] * 28

    def test_nothing_is_drafted_where_a_token_takes_as_long_as_a_pass(self):
        sequence = sequence_of(400)
        for trees in (False, True):
            control = follow_sequence(
                sequence, [Script(sequence, 1.0), Script(sequence, 0.7, 5, name="b")], STEEP, trees=trees
            )
            assert set(control.drafted) == {0}
            assert len(control.outcomes) == 395

    @pytest.mark.parametrize(("right", "least", "most"), [(0.95, 7, 16), (0.7, 2, 4), (0.4, 0.5, 3.5)])
    def test_lengths_are_those_that_bring_most(self, right, least, most):
        """On the laptop's curve, tokens up to the fourth take little time: then a step."""
        sequence = sequence_of(4000)
        control = follow_sequence(sequence, [Script(sequence, right, 3)])
        assert least <= np.mean(control.drafted[-200:-5]) <= most

    def test_what_was_not_verified_is_judged(self):
        """A drafter that is wrong for long and then right is taken up again, though nothing was verified meanwhile."""
        sequence = sequence_of(900)
        control = follow_sequence(sequence, [Script(sequence, lambda place: float(place > 300))])
        places = np.cumsum([len(outcome.tokens) for outcome in control.outcomes])
        drafted = np.array(control.drafted)
        assert drafted[(places > 150) & (places < 290)].sum() == 0
        assert drafted[(places > 700) & (places < 860)].min() >= 3

    def test_evidence_tells_good_guesses_from_bad_ones(self):
        sequence = sequence_of(3000)
        evidence = np.random.default_rng(8).integers(0, 2, len(sequence))
        drafter = Script(sequence, lambda place: (0.05, 0.95)[evidence[place]], evidence=evidence)
        control = follow_sequence(sequence, [drafter], CHOOSY)
        places = 4 + np.cumsum([1, *(len(outcome.tokens) for outcome in control.outcomes[:-1])])
        late = len(places) // 2
        for place, drafted in zip(places[late:-1], control.drafted[late:-1], strict=True):
            assert (drafted > 0) == (evidence[place] == 1)
            # It ends before the first bad guess.
            assert evidence[place : place + drafted].all()

    def test_a_guess_of_two_drafters_has_a_rate_of_its_own(self):
        """Each is right half of the time, which does not pay; where they agree, they are right."""
        sequence = sequence_of(4000)
        one, other = Script(sequence, 0.5, 1, name="one", most=1), Script(sequence, 0.5, 2, name="other", most=1)
        control = follow_sequence(sequence, [one, other], CHOOSY)
        places = 4 + np.cumsum([1, *(len(outcome.tokens) for outcome in control.outcomes[:-1])])
        late = slice(len(places) // 2, -1)
        agree = (one.guess == other.guess)[places[late]]
        assert np.mean(np.array(control.drafted[late])[agree]) > 0.95
        assert np.mean(np.array(control.drafted[late])[~agree]) < 0.05

    def test_two_are_believed_more_than_one_before_anything_was_seen(self):
        sequence = sequence_of(100)
        for drafters, drafted in (
            ([Script(sequence, 1.0)], 0),
            ([Script(sequence, 1.0), Script(sequence, 1.0, name="other")], 1),
        ):
            assert len(OnSurface(drafters, CHOOSY).propose(sequence[:20], 1, 19).draft.tokens) == drafted

    def test_two_drafters_bring_more_than_each(self):
        sequence = sequence_of(3000)
        good = np.arange(len(sequence)) // 50 % 2
        drafters = [
            lambda: Script(sequence, lambda place: 0.9 * good[place], 1, name="one"),
            lambda: Script(sequence, lambda place: 0.9 * (1 - good[place]), 2, name="other"),
        ]
        rounds = [
            len(follow_sequence(sequence, some, FLAT, trees=True).outcomes)
            for some in ([drafters[0]()], [drafters[1]()], [one() for one in drafters])
        ]
        assert rounds[2] < 0.7 * min(rounds[:2])

    def test_drafters_of_one_name_have_rates_of_their_own(self):
        """As two prompt lookups with other n-grams: the first is always wrong, the second always right."""
        sequence = sequence_of(600)
        control = follow_sequence(sequence, [Script(sequence, 0.0), Script(sequence, 1.0)])
        assert np.mean([len(outcome.tokens) for outcome in control.outcomes[-20:-3]]) > 3

    def test_sequences_learn_from_each_other(self):
        sequence = sequence_of(300)
        first = follow_sequence(sequence, [Script(sequence, 0.0)])
        second = follow_sequence(sequence, [Script(sequence, 0.0)], knowledge=first.knowledge)
        assert sum(first.drafted) > 0
        assert sum(second.drafted) == 0


class TestPadding:
    """Where plain decoding is fed four tokens, three drafts take no time."""

    @pytest.mark.parametrize(("right", "drafted"), [(99, 3), (0, 3)])
    def test_free_positions_are_used(self, right, drafted):
        control = OnSurface([Oracle(hashed, right)], STEEP, plain_width=4)
        tokens, _, table = on_session(control, hashed, count=60, chain=4)
        assert tokens == expected(hashed, (1, 2, 3), 60)
        assert {len(fed) for _, fed in table.calls[1:]} == {4}
        assert set(control.drafted[:-3]) == {drafted}
        hoped = [outcome.segment.proposal.expected_seconds for outcome in control.outcomes[:-3]]
        assert hoped == pytest.approx([0.04] * len(hoped))

    def test_others_where_they_pay(self):
        control = OnSurface([Oracle(hashed, 99)], FLAT, plain_width=4)
        _, _, table = on_session(control, hashed, count=200, chain=4)
        assert max(len(fed) for _, fed in table.calls) > 8

    def test_the_width_that_is_learned_from_is_the_passes_own(self):
        control = OnSurface([Oracle(hashed, 0)], LAPTOP, plain_width=4)
        on_session(control, hashed, count=80, chain=4)
        assert {len(outcome.segment.tokens) for outcome in control.outcomes} == {4}
        assert control.knowledge.latency.of(50).seconds == pytest.approx(control.latency.of(50).seconds)


class TestBounds:
    def test_drafters_are_asked_for_no_more_than_may_be_verified(self):
        sequence = sequence_of(200)
        drafter = Script(sequence, 1.0)
        control = follow_sequence(sequence, [drafter], FLAT, most=5)
        assert max(drafter.asked) == 5
        assert max(control.drafted) == 5
        # 4 + 1 tokens are there, and the last one is never drafted.
        drafter = Script(sequence, 1.0)
        control = OnSurface([drafter], FLAT)
        for most in (3, 1):
            assert len(control.propose(sequence[:50], most, 49).draft.tokens) <= most
            assert drafter.asked[-1] == most

    def test_how_much_drafters_are_asked_for_follows_what_is_accepted(self):
        sequence = sequence_of(700)
        asked = {}
        for right in (0.0, 1.0):
            drafter = Script(sequence, right)
            follow_sequence(sequence, [drafter], FLAT)
            asked[right] = drafter.asked[-20:-13]
        assert asked == {0.0: [8] * 7, 1.0: [31] * 7}

    @pytest.mark.parametrize("most", [0, -1])
    def test_nobody_is_asked_where_nothing_can_be_verified(self, most):
        drafter = Script(sequence_of(50), 1.0)
        assert OnSurface([drafter]).propose(sequence_of(50)[:9], most, 8) is NO_PROPOSAL
        assert OnSurface([drafter], most=0).propose(sequence_of(50)[:9], 7, 8) is NO_PROPOSAL
        assert drafter.asked == []

    def test_what_a_drafter_may_not_propose_is_an_error(self):
        for drafter, message in ((Trees(hashed, 5), "trees are not exact"), (Longer(), "'Longer' proposed 9 tokens")):
            with pytest.raises(GenerationError, match=message):
                on_session(OnSurface([drafter]), hashed)


class Longer:
    def propose(self, context, max_tokens):
        return Draft(tokens=np.zeros(max_tokens + 1, np.int64))
