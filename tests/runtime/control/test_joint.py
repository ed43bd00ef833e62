"""Drafts of several sequences compete for one pass."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.control.candidates import Prepared, merge, select_jointly
from runtime.control.latency import Latencies, LatencyModel
from runtime.drafters.base import Draft

# Cached lengths are looked up in steps of 64, so what is asked for 16 positions counts attention to 32: up to 5 %.
SURFACE = {16: {1: 10.0, 2: 10.0, 4: 12.0, 8: 16.0, 16: 24.0, 64: 72.0}, 1024: {1: 12.0, 2: 12.5, 4: 15.0, 8: 20.0}}


def chain(probabilities, *, most=31, tree=True):
    """A sequence whose drafts are a chain; each token is right with a probability, given those before it."""
    candidates = merge([Draft(tokens=np.arange(len(probabilities)))]) if probabilities else merge([])
    return Prepared(candidates=candidates, probability=lambda place: probabilities[place], most=most, tree=tree)


def flat(step, count=64):
    """A pass takes 10, and each draft so much more."""
    return Latencies([10.0 + step * number for number in range(count + 1)])


class TestSelection:
    def test_the_likeliest_come_first_wherever_they_are_from(self):
        found = select_jointly([chain([0.9, 0.9, 0.1]), chain([0.5, 0.1])], flat(1.5))
        # 0.9, 0.81 and 0.5 raise the tokens per second, 0.081 and 0.05 do not.
        assert found.chosen == [[0, 1], [0]]
        assert found.tokens == pytest.approx([2.71, 1.5])
        assert found.seconds == 14.5

    def test_drafts_fade_as_the_pass_fills(self):
        drafts = [0.5]
        counts = []
        for others in (0, 8, 64):
            found = select_jointly([chain(drafts), chain(drafts)], flat(1.0), others=others)
            counts.append(sum(map(len, found.chosen)))
        assert counts == [2, 0, 0]

    def test_no_more_than_a_sequence_may_have(self):
        found = select_jointly([chain([0.99] * 8, most=3), chain([0.99] * 8, most=0)], flat(0.1))
        assert found.chosen == [[0, 1, 2], []]

    def test_no_more_than_there_are_latencies(self):
        found = select_jointly([chain([0.99] * 8), chain([0.99] * 8)], flat(0.1, count=5))
        assert sum(map(len, found.chosen)) == 5

    def test_siblings_only_in_trees(self):
        draft = Draft(tokens=np.array([1, 2, 3]), parents=np.array([-1, -1, 0]))
        for tree, chosen in ((True, [0, 1, 2]), (False, [0, 2])):
            part = Prepared(
                candidates=merge([draft]), probability=lambda place: (0.6, 0.35, 0.5)[place], most=9, tree=tree
            )
            found = select_jointly([part], flat(0.1))
            assert sorted(found.chosen[0]) == chosen

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=1, max_size=3),
        st.lists(st.floats(0.1, 8.0), min_size=12, max_size=12),
    )
    def test_no_other_choice_of_beginnings_is_better(self, parts, steps):
        """Against every combination of how much of each chain is verified."""
        latency = Latencies(np.cumsum([10.0, *steps]).tolist())
        found = select_jointly([chain(one) for one in parts], latency)
        rate = sum(found.tokens) / found.seconds
        lengths = [range(len(one) + 1) for one in parts]
        for counts in np.ndindex(*(len(one) for one in lengths)):
            expected = sum(
                1 + sum(float(np.prod(one[: depth + 1])) for depth in range(count))
                for one, count in zip(parts, counts, strict=True)
            )
            assert expected / latency.seconds[sum(counts)] <= rate * (1 + 1e-9)

    def test_gains_are_what_the_drafts_save(self):
        found = select_jointly([chain([0.9, 0.9, 0.1]), chain([0.5, 0.1]), chain([0.1])], flat(1.5), others=2)
        plain = 10.0 / 5
        assert sum(found.gains) == pytest.approx((2 + sum(found.tokens)) * plain - found.seconds)
        assert found.gains == pytest.approx([1.71 * plain - 2 * 1.5, 0.0, 0.0])
        assert select_jointly([], flat(1.5)).gains == []


class TestLatencyOfAPass:
    @pytest.mark.parametrize("beside", [[], [(200, 64)]], ids=["alone", "beside a prompt"])
    def test_the_threshold_is_that_of_the_next_drafts(self, beside):
        model = LatencyModel(SURFACE, widest=32)
        parts = [(16, 1), (500, 1), (1020, 2)]
        threshold = model.threshold(parts, beside=beside, most=32)
        latency, _ = model.of_rounds(parts, beside=beside, most=32)
        assert threshold.token_seconds == pytest.approx(latency.seconds[0] / 3)
        assert threshold.least == pytest.approx(latency.least_ahead[0] * 3 / latency.seconds[0])
        assert model.seconds_of(parts) == pytest.approx(model.of_pass(parts, most=0).seconds[0])

    def test_no_draft_pays_where_there_is_no_room(self):
        assert LatencyModel(SURFACE, widest=32).threshold([(16, 1)], beside=[], most=0).least == float("inf")

    def test_one_sequence_takes_what_was_recorded(self):
        model = LatencyModel(SURFACE, widest=32)
        for cached in (16, 500, 1024):
            alone = model.of(cached).seconds
            for width in (1, 4, 8):
                assert model.of_pass([(cached, width)], most=0).seconds[0] == pytest.approx(alone[width - 1], rel=1e-6)

    def test_linears_by_all_positions_and_attention_by_each_sequence(self):
        model = LatencyModel(SURFACE, widest=32)
        near = model.of_pass([(10, 1)] * 4, most=2)
        base = [model.of(10).seconds[width] for width in (3, 4, 5)]
        assert near.seconds == pytest.approx(base, rel=0.02)
        far = model.of_pass([(1020, 1)] * 4, most=0).seconds[0]
        # Each sequence's attention adds what its cached positions add to a pass of its own.
        assert far == pytest.approx((12.0 + 4 * 2.0) / 1e3, rel=0.05)

    def test_what_is_known_of_more_drafts_serves_fewer(self):
        model = LatencyModel(SURFACE, widest=32)
        parts = [(16, 1)] * 3
        many = model.of_pass(parts, most=40)
        for most in (0, 1, 15, 16, 17, 39):
            few = model.of_pass(parts, most=most)
            assert few.seconds == many.seconds[: most + 1]
            # No further draft is had after the last; before it, a bound over more of them is one over fewer.
            exact = Latencies(few.seconds).least_ahead
            assert few.least_ahead[-1] == float("inf")
            # The two are summed in another order: a few last bits of float64.
            assert all(bound <= least * (1 + 1e-9) for bound, least in zip(few.least_ahead, exact, strict=True))

    def test_shapes_of_all_kinds_take_no_more_memory(self):
        model = LatencyModel(SURFACE, widest=32)

        def shapes(totals):
            for total in totals:
                for most in range(0, 128, 5):
                    model.of_pass([(16, 1)] * total, most=most)

        shapes(range(1, 60))
        tracemalloc.start()
        try:
            shapes(range(60, 400))
            assert tracemalloc.get_traced_memory()[0] < 400_000
        finally:
            tracemalloc.stop()

    def test_a_prompt_beside_rounds_lets_no_draft_pay(self):
        model = LatencyModel(SURFACE, widest=32)
        rounds, prompt = [(16, 1)] * 4, [(16, 60)]
        alone = model.of_pass(rounds, most=8)
        beside, prompt_seconds = model.of_rounds(rounds, beside=prompt, most=8)
        assert beside.seconds[0] == pytest.approx(alone.seconds[0])
        assert model.of_rounds(rounds, beside=[], most=8)[0].seconds == alone.seconds
        # A draft costs what it adds to the whole pass.
        both = model.of_pass([*prompt, *rounds], most=8).seconds
        assert beside.seconds[0] + prompt_seconds == pytest.approx(both[0])
        assert np.diff(beside.seconds) == pytest.approx(np.diff(both))
        # Beside a prompt that takes 60 ms, a token that is right every fourth time was worth its millisecond.
        unlikely = [chain([0.25]) for _ in range(4)]
        assert sum(map(len, select_jointly(unlikely, model.of_pass([*prompt, *rounds], most=8)).chosen)) == 4
        assert sum(map(len, select_jointly(unlikely, beside).chosen)) == 0

    def test_beyond_what_was_recorded_the_slope_goes_on(self):
        model = LatencyModel(SURFACE, widest=32)
        assert model.of_pass([(16, 1)] * 128, most=0).seconds[0] == pytest.approx(0.136, rel=0.05)

    def test_a_correction_follows_what_is_seen(self):
        model = LatencyModel(SURFACE, widest=32)
        parts = [(16, 1)] * 8
        before = model.of_pass(parts, most=0).seconds[0]
        for _ in range(200):
            model.correct_pass(parts, 1.5 * before)
        assert model.of_pass(parts, most=0).seconds[0] == pytest.approx(1.5 * before, rel=0.02)
        # What a sequence alone takes is another matter.
        assert model.of(16).seconds[0] == pytest.approx(0.010, rel=0.01)

    def test_positions_that_fit_a_time(self):
        model = LatencyModel(SURFACE, widest=32)
        assert model.positions_within(0.0005) == 0
        for positions in (8, 64, 100):
            seconds = model.of_pass([(16, 1)] * positions, most=0).seconds[0]
            assert abs(model.positions_within(seconds * 1.0001) - positions) <= 0.05 * positions

    def test_fewer_positions_fit_after_many(self):
        """Their attention takes time as well, in passes wider than were recorded there, too."""
        model = LatencyModel({16: {1: 10.0, 16: 25.0, 256: 265.0}, 4096: {1: 20.0, 16: 65.0}}, widest=32)
        # After 4096 positions each of many adds two milliseconds and a quarter to the one of the linears.
        assert model.positions_within(0.1) == pytest.approx(91, abs=2)
        assert model.positions_within(0.1, cached=4080) == pytest.approx(28, abs=2)
        assert model.positions_within(0.4, cached=4080) == pytest.approx(120, abs=2)
        for _ in range(200):
            model.correct_pass([(16, 1)] * 8, 2 * model.seconds_of([(16, 1)] * 8))
        assert model.positions_within(0.1) < 60


def test_the_least_that_is_ahead_is_that_of_every_number():
    seconds = [10.0, 12.0, 11.0, 15.0, 15.5]
    found = Latencies(seconds).least_ahead
    for here in range(len(seconds) - 1):
        expected = min((seconds[more] - seconds[here]) / (more - here) for more in range(here + 1, len(seconds)))
        assert found[here] == pytest.approx(expected)
    assert found[-1] == float("inf")
