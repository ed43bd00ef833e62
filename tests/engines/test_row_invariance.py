"""The probe finds the faults that real kernels have, and passes what is exact."""

import pytest

from engines.row_invariance import Sweep, brief_sweeps, full_sweeps, probe
from tests.engines.fakes import FaultySession

SWEEP = Sweep(first=1, last=160)


def chain_of(session, sweep=SWEEP):
    return probe([(session, [sweep])]).chain


def test_exact_rows_pass_at_width_one():
    assert chain_of(FaultySession()) == 1


def test_a_sweep_with_gaps_passes_too():
    assert chain_of(FaultySession(), Sweep(first=1, last=160, only=frozenset({1, 5, 40, 90, 160}))) == 1


def test_a_last_bit_at_width_one_makes_it_two():
    assert chain_of(FaultySession(lambda length, width, row: width == 1)) == 2


def test_a_narrow_kernel_up_to_width_four_makes_it_five():
    assert chain_of(FaultySession(lambda length, width, row: width <= 4)) == 5


@pytest.mark.parametrize("total", [64, 100, 150])
def test_a_change_of_path_at_one_total_is_found(total):
    """As with head sizes above 128: a pass with at most so many rows in total differs from longer ones."""
    assert chain_of(FaultySession(lambda length, width, row: length + width <= total)) is None


def test_drafts_that_leak_into_earlier_rows_are_found():
    assert chain_of(FaultySession(leak=lambda length, width: width > 1)) is None


def test_a_fault_in_one_place_of_one_width_is_found():
    assert chain_of(FaultySession(lambda length, width, row: width == 13 and row == 0 and length == 77)) == 14


def test_a_fault_in_the_cache_alone_is_found():
    session = FaultySession()
    honest = session.run_logits

    def run_logits(token_ids, cache_length, num_logits_rows):
        logits = honest(token_ids, cache_length, num_logits_rows)
        if len(token_ids) == 9:
            session.caches[0][1][0, 0, cache_length] += 1
        return logits

    session.run_logits = run_logits
    assert chain_of(session) == 10


def test_sweeps_stay_inside_the_cache():
    contract = FaultySession().contract
    for cut_down, whole in (full_sweeps(contract), brief_sweeps(contract)):
        for sweep in cut_down + whole:
            assert sweep.lengths
            assert sweep.last + max(sweep.widths) <= contract.max_length
