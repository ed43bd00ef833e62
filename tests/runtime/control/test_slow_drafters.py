"""Drafters whose time counts: asked where they pay, and for as much as pays."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.control.controller import _BESIDE_SLOW
from runtime.drafters import Draft
from runtime.segment import NO_PROPOSAL
from tests.runtime.control.processes import FLAT, LAPTOP, Script, SlowScript, follow_sequence, sequence_of


@pytest.fixture
def clock(monkeypatch):
    """Time stands still unless somebody drafts."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("runtime.control.controller.time", clock)
    return clock


class Ending(SlowScript):
    """Has no more to say after a place of the sequence, which it finds out when it is asked there."""

    def __init__(self, sequence, right, clock, *, end):
        super().__init__(sequence, right, clock)
        self.end, self.after_its_end = end, 0

    def propose(self, context, max_tokens):
        if len(context) < self.end:
            return super().propose(context, max_tokens)
        self.after_its_end += 1
        self.seconds_per_token = math.inf
        return Draft(tokens=np.empty(0, np.int64))


def drafted_by_sequence(sequence, clock, knowledge, *, sequences):
    """Drafts in each of several sequences that a good drafter drafts for, one after the other."""
    return [
        sum(follow_sequence(sequence, [SlowScript(sequence, 0.95, clock)], FLAT, knowledge=knowledge).drafted)
        for _ in range(sequences)
    ]


class TestSlow:
    """Drafters whose time counts beside a pass of 10 ms, and positions that take no time."""

    def test_used_where_it_pays(self, clock):
        sequence = sequence_of(600)
        drafter = SlowScript(sequence, 0.9, clock, says=1e-3)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert np.mean([len(outcome.tokens) for outcome in control.outcomes]) > 3
        assert {outcome.segment.proposal.drafter for outcome in control.outcomes[:-1]} == {"slow"}

    def test_not_asked_where_a_token_takes_longer_than_a_pass(self, clock):
        sequence = sequence_of(300)
        drafter = SlowScript(sequence, 1.0, clock, says=50e-3)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert drafter.asked == []
        assert set(control.drafted) == {0}

    def test_tried_shortly_where_it_would_pay_if_it_were_faster_than_it_says(self, clock):
        """It is not: two trials, of which the first may be the prompt's, and no more in this sequence or the next."""
        sequence = sequence_of(300)
        drafter = SlowScript(sequence, 1.0, clock, says=15e-3)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert len(drafter.asked) == 2
        assert max(drafter.asked) <= 2
        again = SlowScript(sequence, 1.0, clock, says=15e-3)
        follow_sequence(sequence, [again], FLAT, knowledge=control.knowledge)
        assert again.asked == []

    def test_used_though_a_busy_build_recorded_four_times_its_latency(self, clock):
        sequence = sequence_of(400)
        drafter = SlowScript(sequence, 0.95, clock, says=8.3e-3 * 2, needs=1e-3)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert np.mean([len(outcome.tokens) for outcome in control.outcomes]) > 3

    def test_not_asked_any_more_where_it_takes_longer_than_it_says(self, clock):
        sequence = sequence_of(400)
        drafter = SlowScript(sequence, 1.0, clock, says=1e-4, needs=15e-3)
        follow_sequence(sequence, [drafter], FLAT)
        # The first time may be the prompt's, so it tells nothing; a trial later on is for few tokens.
        assert 2 <= len(drafter.asked) <= 5
        assert sum(drafter.asked[2:]) < 30

    def test_what_the_prompt_takes_does_not_count(self, clock):
        """An engine that drafts reads the whole prompt before its first token: half a second."""
        sequence = sequence_of(400)
        knowledge = None
        for _ in range(2):
            drafter = SlowScript(sequence, 0.9, clock, says=1e-3, first=0.5)
            control = follow_sequence(sequence, [drafter], FLAT, knowledge=knowledge)
            assert np.mean([len(outcome.tokens) for outcome in control.outcomes]) > 3
            assert max(outcome.segment.proposal.expected_seconds for outcome in control.outcomes) < 0.1
            knowledge = control.knowledge
        assert knowledge.draft_seconds["slow"] == pytest.approx(1e-3)

    def test_tried_again_where_it_was_slow(self, clock):
        """Another sequence used it in between, say; it is fast again."""
        sequence = sequence_of(300)
        knowledge = follow_sequence(sequence[:6], [SlowScript(sequence, 0.9, clock)], FLAT).knowledge
        knowledge.draft_seconds["slow"] = 0.1
        drafted = drafted_by_sequence(sequence, clock, knowledge, sequences=12)
        assert drafted[0] == 0
        assert drafted[-1] > 150
        assert knowledge.draft_seconds["slow"] == pytest.approx(1e-3, rel=0.2)

    def test_what_drafts_no_more_is_not_asked_any_more(self, clock):
        """The sequence has outgrown it: that says nothing about its guesses or its time."""
        sequence = sequence_of(300)
        drafter = Ending(sequence, 0.95, clock, end=100)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert drafter.after_its_end == 1
        assert set(control.drafted[-100:]) == {0}
        again = follow_sequence(sequence[:100], [SlowScript(sequence, 0.95, clock)], FLAT, knowledge=control.knowledge)
        assert sum(again.drafted[:20]) > 60

    def test_asked_more_where_it_takes_less_than_it_says(self, clock):
        sequence = sequence_of(900)
        lengths = {}
        for needs in (4e-3, 2e-4):
            drafter = SlowScript(sequence, 0.85, clock, says=4e-3, needs=needs)
            lengths[needs] = np.mean(follow_sequence(sequence, [drafter], FLAT).drafted[-20:-3])
        assert lengths[2e-4] > 2 * lengths[4e-3] > 0

    def test_rarely_asked_where_it_is_wrong(self, clock):
        sequence = sequence_of(900)
        drafter = SlowScript(sequence, 0.0, clock)
        control = follow_sequence(sequence, [drafter], FLAT)
        assert 0 < len(drafter.asked) < 60
        assert sum(control.drafted[-400:]) < 40

    def test_tried_again_after_hundreds_of_rounds(self, clock):
        """It was wrong for long, in other sequences; now it is right."""
        sequence = sequence_of(300)
        knowledge = follow_sequence(sequence[:6], [SlowScript(sequence, 0.0, clock)], FLAT).knowledge
        # It has drafted there, too.
        knowledge.draft_seconds["slow"] = 1e-3
        for depth in range(16):
            for _ in range(400):
                knowledge.estimates.count(("slow", depth, False), lambda: 0.8, right=False)
        drafted = drafted_by_sequence(sequence, clock, knowledge, sequences=6)
        assert drafted[0] == 0
        assert drafted[-1] > 150

    def test_what_was_drafted_is_judged_once(self, clock):
        sequence = sequence_of(100)
        control = follow_sequence(sequence[:50], [SlowScript(sequence, 1.0, clock)], FLAT)
        assert control.propose(sequence[:50], 20, 49).drafter == "slow"
        assert control.propose(sequence[:50], 0, 49) is NO_PROPOSAL
        before = copy.deepcopy(control.knowledge.estimates._counts)
        control.learn(dataclasses.replace(control.outcomes[-1], tokens=sequence[50:53]))
        assert control.knowledge.estimates._counts == before

    def test_not_asked_where_a_fast_drafter_is_as_good(self, clock):
        sequence = sequence_of(900)
        drafter = SlowScript(sequence, 1.0, clock, says=5e-3)
        follow_sequence(sequence, [Script(sequence, 1.0), drafter], FLAT)
        assert len(drafter.asked) < 10

    def test_beside_a_fast_drafter_that_is_good_at_times(self, clock):
        """Each where it is better: guesses of evidence 1 are right."""
        sequence = sequence_of(4000)
        evidence = np.arange(len(sequence)) // 100 % 2
        fast = Script(sequence, lambda place: 0.97 * evidence[place], 1, evidence=evidence)
        slow = SlowScript(sequence, 0.9, clock, says=2e-3, seed=2)
        control = follow_sequence(sequence, [fast, slow], LAPTOP)
        places = 4 + np.cumsum([1, *(len(outcome.tokens) for outcome in control.outcomes[:-1])])
        late = [
            (evidence[place], outcome.segment.proposal.drafter)
            for place, outcome in zip(places, control.outcomes, strict=True)
            if place > 2000 and evidence[place : place + 10].min() == evidence[place : place + 10].max()
        ]
        assert np.mean([name == "script" for good, name in late if good]) > 0.9
        assert np.mean([name == "slow" for good, name in late if not good]) > 0.9

    def test_its_time_is_expected(self, clock):
        sequence = sequence_of(600)
        control = follow_sequence(sequence, [SlowScript(sequence, 0.9, clock, says=1e-3)], FLAT)
        for outcome in control.outcomes[:-1]:
            drafting = 1e-3 * len(outcome.segment.proposal.draft.tokens)
            assert outcome.segment.proposal.expected_seconds == pytest.approx(outcome.seconds + drafting)
        late = control.outcomes[20:-3]
        hoped = sum(outcome.segment.proposal.expected_tokens for outcome in late)
        assert sum(len(outcome.tokens) for outcome in late) == pytest.approx(hoped, rel=0.15)

    def test_one_that_has_nothing_to_say_stands_in_nobodys_way(self, clock):
        """As an engine whose context is full: what the fast drafter has is verified."""
        sequence = sequence_of(600)
        silent = SlowScript(sequence, 1.0, clock, most=0, needs=0.0)
        control = follow_sequence(sequence, [Script(sequence, 0.7, 3), silent])
        alone = follow_sequence(sequence, [Script(sequence, 0.7, 3)])
        assert np.mean(control.drafted[-50:]) == pytest.approx(np.mean(alone.drafted[-50:]), rel=0.2)

    def test_one_that_says_less_than_asked_for_is_expected_to(self, clock):
        """Every draft is right, but never longer than two tokens."""
        sequence = sequence_of(600)
        control = follow_sequence(sequence, [SlowScript(sequence, 1.0, clock, most=2)], FLAT)
        late = control.outcomes[30:-3]
        hoped = sum(outcome.segment.proposal.expected_tokens for outcome in late)
        assert sum(len(outcome.tokens) for outcome in late) == pytest.approx(hoped, rel=0.15)

    def test_trees_are_judged_along_their_paths(self, clock):
        """Of every two siblings the second is right: half of the tokens, and all that is wanted."""
        sequence = sequence_of(600)

        class Pairs:
            name, seconds_per_token = "pairs", 1e-4

            def propose(self, context, max_tokens):
                right = sequence[len(context) : len(context) + max_tokens // 2]
                tokens = np.stack([(right + 1) % 100, right], axis=1).reshape(-1)
                parents = np.repeat(2 * np.arange(len(right)) - 1, 2)
                clock.now += 1e-4 * max_tokens
                return Draft(tokens=tokens, parents=parents)

        control = follow_sequence(sequence, [Pairs()], FLAT, trees=True)
        late = control.outcomes[-20:-3]
        assert np.mean([len(outcome.tokens) for outcome in late]) > 3
        # Of two guesses one is right: what is expected is what comes.
        hoped = sum(outcome.segment.proposal.expected_tokens for outcome in late)
        assert hoped < 1.2 * sum(len(outcome.tokens) for outcome in late)

    def test_fast_guesses_are_verified_beside_its_own(self, clock):
        """One tree of both: where the slow drafter's first token is wrong, the fast one's may be right."""
        sequence = sequence_of(1500)

        def slow():
            return SlowScript(sequence, 0.75, clock, says=2e-4, seed=2)

        alone = follow_sequence(sequence, [slow()], FLAT, trees=True)
        both = follow_sequence(sequence, [slow(), Script(sequence, 0.6, 1)], FLAT, trees=True)
        lengths = [np.mean([len(one.tokens) for one in control.outcomes]) for control in (alone, both)]
        assert lengths[1] > 1.1 * lengths[0]
        names = [one.segment.proposal.drafter for one in both.outcomes]
        assert names.count("slow+script") > 0.9 * len(names)
        # Where both say the same the guess is better than either's, and where only one does it is worse.
        rate = both.knowledge.estimates.rate
        alone, seconded, other = (
            rate(key, lambda: 0.5) for key in (("slow", 0, 2), ("slow", 0, 3), ("script", 0, _BESIDE_SLOW))
        )
        assert seconded > 0.9
        assert alone < 0.7
        assert other < 0.4
        # What each is worth by itself is not forgotten meanwhile.
        for name, right in (("slow", 0.75), ("script", 0.6)):
            assert rate((name, 0, False), lambda: 0.5) == pytest.approx(right, abs=0.1)

    def test_a_leading_drafter_s_guesses_stay_its_own(self, clock):
        sequence = sequence_of(400)
        leading = Script(sequence, 0.9, 1, name="sure", most=2)
        leading.leads = True
        control = follow_sequence(sequence, [SlowScript(sequence, 1.0, clock, seed=2), leading], FLAT)
        said = [one.segment.proposal.sources for one in control.outcomes[5:-3]]
        assert [sources[:1] for sources in said].count(("sure",)) > 0.8 * len(said)
        assert any("slow" in sources for sources in said)
