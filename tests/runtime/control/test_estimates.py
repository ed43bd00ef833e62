"""Acceptance rates: where they begin, how fast they follow what is seen, and what sequences tell each other."""

import numpy as np
import pytest

from runtime.control.estimates import Estimates, SequenceEstimates


def believed(value):
    return lambda: value


def never():
    raise AssertionError


def see(estimates, key, prior, outcomes):
    for right in outcomes:
        estimates.count(key, believed(prior), right=right)


@pytest.mark.parametrize("kind", [Estimates, lambda: SequenceEstimates(Estimates())], ids=["engine", "sequence"])
@pytest.mark.parametrize("prior", [0.0, 0.1, 0.9, 1.0])
class TestRates:
    def test_begin_with_what_is_believed(self, kind, prior):
        assert kind().rate("a", believed(prior)) == pytest.approx(prior)

    def test_move_with_every_guess(self, kind, prior):
        estimates = kind()
        for right in (True, False, True):
            before = estimates.rate("a", believed(prior))
            estimates.count("a", believed(prior), right=right)
            after = estimates.rate("a", never)
            assert 0 <= after <= 1
            # As far as it goes: 0 and 1 are certain.
            assert after == pytest.approx(before) if before == right else (after > before) == right

    def test_become_the_share_that_is_right(self, kind, prior):
        estimates = kind()
        see(estimates, "a", prior, np.random.default_rng(1).random(2000) < 0.3)
        assert estimates.rate("a", never) == pytest.approx(0.3, abs=0.06)

    def test_keys_know_nothing_of_each_other(self, kind, prior):
        estimates = kind()
        see(estimates, ("suffix", 3, False), 0.5, [True] * 50)
        assert estimates.rate(("suffix", 3, True), believed(prior)) == pytest.approx(prior)
        assert estimates.rate(("suffix", 4, False), believed(prior)) == pytest.approx(prior)

    def test_what_was_believed_is_asked_once(self, kind, prior):
        estimates = kind()
        estimates.rate("a", believed(prior))
        estimates.rate("a", never)
        estimates.count("a", never, right=True)


def test_few_guesses_do_not_outweigh_what_is_believed():
    estimates = Estimates()
    see(estimates, "a", 0.5, [False])
    assert 0.4 < estimates.rate("a", never) < 0.5
    see(estimates, "a", 0.5, [False] * 29)
    assert estimates.rate("a", never) < 0.15


def test_the_rate_follows_a_change():
    """After ten thousand guesses of one kind, some hundred of another are enough."""
    estimates = Estimates()
    see(estimates, "a", 0.5, [True] * 10_000)
    assert estimates.rate("a", never) > 0.99
    see(estimates, "a", 0.5, [False] * 700)
    assert estimates.rate("a", never) < 0.25


def test_what_was_seen_fades_to_what_was_believed():
    estimates = Estimates()
    see(estimates, "a", 0.8, [False] * 300)
    rates = [estimates.rate("a", never)]
    assert rates[0] < 0.1
    for _ in range(2000):
        estimates.fade("a", believed(0.8))
        rates.append(estimates.rate("a", never))
    assert rates == sorted(rates)
    # It takes hundreds of rounds, not tens.
    assert rates[50] < 0.15
    assert rates[-1] == pytest.approx(0.8, abs=0.01)
    # And what was always believed stays.
    estimates.fade("b", believed(0.3))
    assert estimates.rate("b", never) == pytest.approx(0.3)


class TestSequences:
    def test_a_sequence_begins_with_the_rates_of_the_others(self):
        everywhere = Estimates()
        see(SequenceEstimates(everywhere), "a", 0.5, [True] * 200)
        assert SequenceEstimates(everywhere).rate("a", never) == everywhere.rate("a", never) > 0.9

    def test_its_own_guesses_count_more(self):
        everywhere = Estimates()
        see(SequenceEstimates(everywhere), "a", 0.5, [True] * 200)
        own = SequenceEstimates(everywhere)
        see(own, "a", 0.5, [False] * 20)
        assert own.rate("a", never) < 0.35
        assert everywhere.rate("a", never) > 0.8
        assert SequenceEstimates(everywhere).rate("a", never) == everywhere.rate("a", never)

    def test_others_go_on_learning(self):
        everywhere = Estimates()
        one, other = SequenceEstimates(everywhere), SequenceEstimates(everywhere)
        before = other.rate("a", believed(0.5))
        see(one, "a", 0.5, [True] * 50)
        assert other.rate("a", never) > before
