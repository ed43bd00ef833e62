"""Latencies: between and beyond what was recorded, and corrected by what passes take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.control.latency import Latencies, LatencyModel

quick = settings(deadline=None, max_examples=100, database=None, derandomize=True)
SURFACE = {32: {1: 8.0, 4: 9.5, 8: 14.0}, 1056: {1: 10.0, 4: 13.0, 8: 20.0}}


def milliseconds(latencies):
    return [1e3 * one for one in latencies.seconds]


def model(surface=None, widest=12):
    return LatencyModel(SURFACE if surface is None else surface, widest=widest)


def feed(model, passes, ratio, length=500):
    """Passes of random widths that take `ratio(width)` times what was recorded."""
    recorded = LatencyModel(SURFACE, widest=12).of(length).seconds
    for width in np.random.default_rng(3).integers(1, 13, passes).tolist():
        model.correct(length, width, ratio(width) * recorded[width - 1])


class TestSurface:
    def test_between_widths_a_line_and_after_them_the_last_slope(self):
        at_first = milliseconds(model({300: SURFACE[32]}).of(0))
        expected = [8.0, 8.5, 9.0, 9.5, 10.625, 11.75, 12.875, 14.0, 15.125, 16.25, 17.375, 18.5]
        assert at_first == pytest.approx(expected)
        # One cached length serves all.
        assert milliseconds(model({300: SURFACE[32]}).of(5000)) == pytest.approx(expected)

    def test_between_cached_lengths_a_line(self):
        low, high = (model({length: SURFACE[length]}).of(0).seconds for length in SURFACE)
        # Latencies are those of the middle of 64 positions: of 288, a quarter of the way.
        found = model().of(256).seconds
        assert found == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(low, high, strict=True)])
        assert model().of(319).seconds == found
        assert model().of(320).seconds[0] > found[0] > model().of(255).seconds[0]

    def test_before_the_cached_lengths_the_nearest_and_after_them_the_line_goes_on(self):
        known = model({512: SURFACE[32], 640: SURFACE[1056]})
        assert milliseconds(known.of(0))[:1] == pytest.approx([8.0])
        assert milliseconds(known.of(9000))[:1] == pytest.approx([8.0 + 2.0 * (8992 - 512) / 128])
        # Whatever noise recorded, no longer context is faster.
        assert milliseconds(model({512: {1: 9.0}, 640: {1: 8.0}}).of(9000))[:1] == pytest.approx([8.0])

    def test_three_cached_lengths(self):
        known = model({0: {1: 1.0}, 64: {1: 2.0}, 128: {1: 4.0}}, widest=2)
        assert [milliseconds(known.of(length))[0] for length in (0, 63, 64, 130)] == pytest.approx([1.5, 1.5, 3.0, 5.0])

    def test_one_width_alone_serves_all(self):
        assert milliseconds(model({0: {1: 3.0}}, widest=4).of(0)) == pytest.approx([3.0] * 4)

    def test_before_the_first_width_the_nearest(self):
        assert milliseconds(model({0: {3: 3.0, 4: 5.0}}, widest=5).of(0)) == pytest.approx([3.0, 3.0, 3.0, 5.0, 7.0])

    @quick
    @given(
        st.dictionaries(
            st.integers(0, 2000),
            st.dictionaries(st.integers(1, 16), st.floats(0.1, 50), min_size=1),
            min_size=1,
            max_size=4,
        ),
        st.integers(0, 4000),
    )
    def test_never_falls_with_the_width(self, surface, length):
        found = milliseconds(LatencyModel(surface, widest=32).of(length))
        assert len(found) == 32
        assert (np.diff(found) >= -1e-9).all()
        recorded = [ms for by_width in surface.values() for ms in by_width.values()]
        assert min(recorded) - 1e-9 <= found[0]


class TestCorrection:
    @pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.5, 3.0, 6.0])
    def test_passes_that_take_a_multiple(self, factor):
        known = model()
        feed(known, 1200, lambda width: factor)
        for length in (20, 500, 900):
            found = np.array(known.of(length).seconds) / model().of(length).seconds
            # The recorded surface keeps a tenth of the weight.
            assert found == pytest.approx(factor, abs=0.16 * abs(factor - 1) + 1e-9)

    def test_wide_passes_that_take_more(self):
        """As beside another process: the narrow pass waits for memory, the wide one for cores."""
        known = model()
        feed(known, 1200, lambda width: 1 + 0.05 * (width - 1))
        found = np.array(known.of(500).seconds) / model().of(500).seconds
        expected = 1 + 0.05 * np.arange(12)
        assert found == pytest.approx(1 + (expected - 1) * 0.9, rel=0.05)
        assert (np.diff(known.of(500).seconds) > 0).all()

    def test_one_width_alone_says_little_about_others(self):
        known = model()
        recorded = model().of(500).seconds
        for _ in range(600):
            known.correct(500, 1, 1.4 * recorded[0])
        found = np.array(known.of(500).seconds) / recorded
        assert found[0] == pytest.approx(1.4, abs=0.05)
        assert (found > 0).all()

    def test_one_huge_outlier_does_not_matter(self):
        known = model()
        feed(known, 640, lambda width: 1.0)
        before = known.of(500).seconds
        known.correct(500, 6, 1000 * before[5])
        feed(known, 31, lambda width: 1.0)
        assert known.of(500).seconds == pytest.approx(before, rel=0.03)
        assert before == pytest.approx(model().of(500).seconds)

    def test_an_outlier_at_the_very_beginning(self):
        known = model()
        known.correct(500, 1, 1000.0)
        feed(known, 31, lambda width: 1.0)
        assert known.of(500).seconds == pytest.approx(model().of(500).seconds, rel=0.1)

    def test_a_machine_that_recovers(self):
        known = model()
        feed(known, 640, lambda width: 2.5)
        feed(known, 1600, lambda width: 1.0)
        assert known.of(500).seconds == pytest.approx(model().of(500).seconds, rel=0.02)

    def test_latencies_stay_above_nothing(self):
        known = model()
        feed(known, 2000, lambda width: 0.0)
        assert min(known.of(500).seconds) > 0
        known = model()
        # Narrow passes are slow, wide ones fast: a line through them would reach below zero.
        feed(known, 2000, lambda width: 2.0 if width < 6 else 0.01)
        assert min(known.of(500).seconds) >= 0.1 * min(model().of(500).seconds)

    def test_latencies_change_seldom(self):
        """A correction makes every latency anew."""
        known = model()
        seen = set()
        recorded = known.of(500).seconds
        for _ in range(320):
            known.correct(500, 4, 1.5 * recorded[3])
            seen.add(known.of(500).seconds[3])
        assert 5 <= len(seen) <= 12


class TestLatencies:
    @quick
    @given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12))
    def test_least_ahead_is_the_fastest_way_on(self, seconds):
        latencies = Latencies(seconds)
        assert len(latencies.least_ahead) == len(seconds)
        for here, least in enumerate(latencies.least_ahead):
            each = [(seconds[more] - seconds[here]) / (more - here) for more in range(here + 1, len(seconds))]
            assert least == (min(each) if each else float("inf"))

    @pytest.mark.parametrize(
        ("width", "expected"),
        [(1, [1.0, 2.0, 4.0, 8.0]), (2, [2.0, 2.0, 4.0, 8.0]), (3, [4.0, 4.0, 4.0, 8.0]), (4, [8.0] * 4)],
    )
    def test_narrow_passes_are_padded(self, width, expected):
        padded = Latencies([1.0, 2.0, 4.0, 8.0]).padded(width)
        assert padded.seconds == expected
        assert padded.least_ahead == Latencies(expected).least_ahead
