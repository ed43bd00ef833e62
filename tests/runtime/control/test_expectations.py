"""What the controller expects comes true, and is kept in the statistics; its latencies follow what passes take."""

import numpy as np
import pytest

from runtime.control.controller import Knowledge
from runtime.control.latency import LatencyModel
from runtime.drafters import Suffix
from runtime.segment import NO_PROPOSAL
from runtime.stats import StatsBuilder
from tests.runtime.control.processes import (
    FLAT,
    LAPTOP,
    STEEP,
    OnSurface,
    Script,
    at_times,
    follow_sequence,
    on_session,
    sequence_of,
)
from tests.runtime.test_loop import Oracle, hashed


class TestExpectations:
    @pytest.mark.parametrize("surface", [FLAT, LAPTOP], ids=["flat", "laptop"])
    @pytest.mark.parametrize("right", [0.3, 0.6, 0.9])
    @pytest.mark.parametrize("trees", [False, True])
    def test_tokens_of_a_stationary_process(self, surface, right, trees):
        sequence = sequence_of(6000)
        control = follow_sequence(
            sequence, [Script(sequence, right, 3), Script(sequence, 0.3, 4, name="other")], surface, trees=trees
        )
        late = control.outcomes[len(control.outcomes) // 4 : -20]
        hoped = sum(outcome.segment.proposal.expected_tokens for outcome in late)
        assert sum(len(outcome.tokens) for outcome in late) == pytest.approx(hoped, rel=0.06)

    def test_seconds_are_the_surface(self):
        sequence = sequence_of(800)
        control = follow_sequence(sequence, [Script(sequence, 0.8, 3)])
        for outcome in control.outcomes[:-1]:
            assert outcome.segment.proposal.expected_seconds == pytest.approx(outcome.seconds)
        assert len(set(control.drafted)) > 1

    def test_latencies_follow_what_passes_take(self):
        """The surface says that tokens take no time; in truth each takes as long as a pass."""
        sequence = sequence_of(3000)
        control = follow_sequence(
            sequence, [at_times(sequence, 0.75)], STEEP, knowledge=Knowledge(LatencyModel(FLAT, widest=32))
        )
        assert np.mean(control.drafted[-100:]) < 0.5 * np.mean(control.drafted[:100])
        assert control.knowledge.latency.of(300).seconds[3] > 0.02

    def test_no_slower_than_plain_decoding_where_wide_passes_became_slow(self):
        """Another process takes the cores: four tokens take twice as long as recorded, one takes what it took."""
        sequence = sequence_of(4000)
        busy = {256: {1: 9.0, 4: 20.6, 8: 40.0}}
        control = follow_sequence(
            sequence, [at_times(sequence, 0.4)], busy, knowledge=Knowledge(LatencyModel(LAPTOP, widest=32))
        )
        late = control.outcomes[len(control.outcomes) // 2 :]
        plain = 9e-3 * sum(len(outcome.tokens) for outcome in late)
        assert sum(outcome.seconds for outcome in late) < 1.03 * plain

    def test_a_round_that_drafts_nothing_expects_a_token(self):
        sequence = sequence_of(60)
        control = follow_sequence(sequence, [Script(sequence, 1.0)], STEEP)
        plans = [outcome.segment.proposal for outcome in control.outcomes[:-1]]
        assert {(plan.expected_tokens, plan.expected_seconds, plan.drafter) for plan in plans} == {(1.0, 0.01, "")}

    def test_they_travel_to_the_statistics(self):
        control = OnSurface([Oracle(hashed, 4), Suffix()], FLAT)
        _, rounds, _ = on_session(control, hashed, count=60)
        tally = StatsBuilder(3)
        for step in rounds:
            tally.add(step)
        stats = tally.stats()
        plans = [(step.drafter, step.drafted) for step in rounds[1:]]
        assert {one[0] for one in plans} >= {"Oracle"}
        assert {(one.drafter, one.num_draft_tokens): one.rounds for one in stats.drafts} == {
            kind: plans.count(kind) for kind in plans
        }
        assert sum(one.tokens for one in stats.drafts) == stats.tokens - 1
        assert sum(one.seconds for one in stats.drafts) == pytest.approx(stats.decode_seconds)
        assert [one.rounds for one in stats.drafts] == sorted((one.rounds for one in stats.drafts), reverse=True)
        hoped = sum(outcome.segment.proposal.expected_tokens for outcome in control.outcomes)
        assert sum(one.expected_tokens for one in stats.drafts) == pytest.approx(hoped)
        # The last round had no room for drafts: nothing was expected of it.
        planned = sum(outcome.segment.proposal is not NO_PROPOSAL for outcome in control.outcomes)
        assert sum(one.expected_rounds for one in stats.drafts) == planned > 0
