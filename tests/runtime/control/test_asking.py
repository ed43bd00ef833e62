"""Drafters are not asked in shared passes where that cannot pay, or takes the host longer than it saves."""

import numpy as np
import pytest

from runtime.control.asking import _FIRST, _TRIAL_SHARE, Asking, SequenceAsking
from runtime.control.controller import Controller, Knowledge
from runtime.control.latency import LatencyModel, Threshold
from runtime.drafters import Draft, PromptLookup
from tests.runtime.scheduling import Service, answer_alone

# Milliseconds: of two positions or more, each takes longer than a pass brings per token; and next to nothing.
DEAR = {256: {1: 10.0, 8: 90.0}}
CHEAP = {256: {1: 10.0, 8: 10.1}}
FAIR = Threshold(least=0.5, token_seconds=2e-3)
COUNT = 60


class Counted:
    """A drafter that counts how often it is asked; it needs so many seconds of the clock."""

    name = "counted"

    def __init__(self, right, clock=None, takes=0.0):
        self.right, self.clock, self.takes, self.asked = right, clock, takes, 0

    def propose(self, context, max_tokens):
        self.asked += 1
        if self.clock is not None:
            self.clock.now += self.takes
        draft = PromptLookup().propose(context, max_tokens)
        # No session of these tests ever chooses this one.
        return draft if self.right else Draft(tokens=np.full(len(draft.tokens), 99))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def together(surface, count=3, *, right=True, takes=0.0, tokens=COUNT):
    """So many sequences that decode at once: their drafters, and the scheduler's metrics."""
    clock = Clock()
    knowledge = Knowledge(LatencyModel(surface, widest=32), clock=clock)
    # Passes take no time here: what they are expected to take stays.
    knowledge.latency.correct_pass = lambda parts, seconds: None
    knowledge.latency.correct = lambda length, width, seconds: None
    service = Service(slots=count, knowledge=lambda: knowledge)
    drafters = [Counted(right, clock, takes) for _ in range(count)]
    requests = [service.start([place], tokens, most_unread=None, drafts=1) for place in range(count)]
    for request, drafter in zip(requests, drafters, strict=True):
        request.decoding.control = Controller([drafter], knowledge, most=4, trees=True)
    for place, request in enumerate(requests):
        answer = [token for step in service.stream(request) for token in step.round.tokens]
        assert answer == answer_alone([place], tokens)
    return drafters, service.scheduler.metrics()


class TestSharedPasses:
    def test_nobody_is_asked_where_no_draft_can_pay(self):
        drafters, metrics = together(DEAR)
        assert metrics.sequences_per_pass == {3: COUNT}
        assert [one.asked for one in drafters] == [0, 0, 0]

    def test_everybody_is_asked_where_drafts_pay(self):
        drafters, metrics = together(CHEAP)
        assert metrics.accepted_tokens > 10
        rounds = sum(width * count for width, count in metrics.sequences_per_pass.items())
        assert sum(one.asked for one in drafters) > 0.8 * rounds

    def test_a_sequence_alone_is_asked_as_before(self):
        [drafter], metrics = together(DEAR, 1)
        assert metrics.drafted_tokens == 0
        # Every round but the prompt's and the last, which has no room for a draft.
        assert drafter.asked == COUNT - 2

    def test_asked_again_once_thresholds_have_fallen(self):
        knowledge = Knowledge(LatencyModel(DEAR, widest=32))
        service = Service(slots=2, knowledge=lambda: knowledge)
        drafter = Counted(right=True)
        lasting, short = (service.start([place], count, most_unread=None) for place, count in ((0, COUNT), (1, 20)))
        lasting.decoding._plain = False
        lasting.decoding.control = Controller([drafter], knowledge, most=4, trees=True)
        for _ in service.stream(short):
            assert drafter.asked == 0
        for _ in service.stream(lasting):
            pass
        assert drafter.asked > 30

    @pytest.mark.parametrize(("takes", "least", "most"), [(0.0, 55, 60), (2e-3, 5, 20)])
    def test_what_asking_takes_counts(self, takes, least, most):
        """Drafts that are always wrong are dear where they take the host's time, and judged every round where not."""
        drafters, _ = together(CHEAP, right=False, takes=takes)
        assert all(least <= one.asked <= most for one in drafters)

    def test_what_saves_less_than_it_takes_is_seldom_asked_for(self):
        """Right drafts, each of which saves less than the 20 ms that asking takes."""
        drafters, _ = together(CHEAP, takes=20e-3)
        assert sum(one.asked for one in drafters) < 0.4 * 3 * COUNT


def learnt(takes=100e-6, saves=0.0):
    """An engine whose sequences have asked often enough."""
    everywhere = Asking()
    for _ in range(_FIRST):
        everywhere.took(takes)
        everywhere.saved(saves)
    return everywhere


class TestOneSequence:
    def test_it_begins_with_a_trial(self):
        asking = SequenceAsking(learnt())
        assert [asking.asks(FAIR) for _ in range(3)] == [True, False, False]

    def test_trials_take_their_share_of_the_passes(self):
        asking, asked = SequenceAsking(learnt()), 0
        for _ in range(10_000):
            if asking.asks(FAIR):
                asked += 1
                asking.took(100e-6)
                asking.gained(0.0)
        assert asked * 100e-6 == pytest.approx(_TRIAL_SHARE * 10_000 * FAIR.token_seconds, rel=0.1)

    def test_one_that_saves_goes_on(self):
        asking = SequenceAsking(learnt())
        assert asking.asks(FAIR)
        asking.gained(2e-3)
        assert all(asking.asks(FAIR) for _ in range(100))

    def test_others_are_asked_where_all_save(self):
        assert all(SequenceAsking(learnt(saves=1e-3)).asks(FAIR) for _ in range(3))

    def test_no_trial_where_no_draft_can_pay(self):
        asking = SequenceAsking(Asking())
        assert not any(asking.asks(Threshold(least=1.0, token_seconds=1.0)) for _ in range(1000))

    def test_lower_thresholds_are_tried_at_once(self):
        asking = SequenceAsking(learnt())
        assert asking.asks(Threshold(least=0.9, token_seconds=2e-3))
        asking.gained(0.0)
        assert not asking.asks(Threshold(least=0.85, token_seconds=2e-3))
        assert asking.asks(Threshold(least=0.6, token_seconds=2e-3))
        assert not asking.asks(Threshold(least=0.6, token_seconds=2e-3))

    def test_an_interruption_counts_a_few_times_the_mean(self):
        everywhere = learnt()
        everywhere.took(10.0)
        assert everywhere.takes < 200e-6

    def test_the_first_asking_of_a_sequence_reads_the_prompt(self):
        everywhere = learnt()
        asking = SequenceAsking(everywhere)
        asking.took(5e-3)
        assert everywhere.takes == pytest.approx(100e-6)
        asking.took(150e-6)
        assert everywhere.takes > 100e-6
