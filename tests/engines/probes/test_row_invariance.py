"""The probe finds the faults that real kernels have, and passes what is exact."""

import dataclasses

import pytest

from engines.probes.row_invariance import RowInvariance, Sweep, brief_sweeps, find_row_invariance, full_sweeps
from tests.engines.fakes import FaultySession

SWEEP = Sweep(first=1, last=160)


def chain_of(session, sweep=SWEEP):
    return find_row_invariance((session, [sweep]), (session, [])).chain


def range_of(fault, sweep=SWEEP):
    session = FaultySession(fault)
    found = find_row_invariance((session, [sweep]), (session, []))
    assert found.boundaries == ()
    return found.chain, found.widest


def test_exact_positions_pass_at_every_width():
    assert range_of(lambda length, width, row: False) == (1, 32)


def test_a_sweep_with_gaps_passes_too():
    assert chain_of(FaultySession(), Sweep(first=1, last=160, only=frozenset({1, 5, 40, 90, 160}))) == 1


def test_a_last_bit_at_width_one_makes_it_two():
    assert range_of(lambda length, width, row: width == 1) == (2, 32)


def test_a_narrow_kernel_up_to_width_four_makes_it_five():
    assert range_of(lambda length, width, row: width <= 4) == (5, 32)


def test_a_wide_kernel_limits_the_drafts():
    """As with head size 256: from 193 positions in total on, passes of 15 tokens and more differ."""
    fault = lambda length, width, row: width >= 15 and length + width >= 160  # noqa: E731
    assert range_of(fault) == (1, 14)


@pytest.mark.parametrize("totals", [(64,), (100,), (150, 278)])
def test_totals_at_which_the_path_changes_are_found(totals):
    """As with head sizes above 128: a position's bits depend on how many boundaries lie below the pass's total."""
    session = FaultySession(path=lambda length, width: sum(length + width >= total for total in totals))
    found = find_row_invariance((session, [SWEEP]), (session, []))
    assert (found.chain, found.widest, found.boundaries) == (1, 32, totals)


def test_a_boundary_that_one_more_token_does_not_show():
    """As rounding may hide it: passes of 2 to 5 tokens that reach over it keep the first position's bits."""

    def path(length, width):
        return length + (1 if 2 <= width <= 5 else width) >= 100

    session = FaultySession(path=path)
    session.contract = dataclasses.replace(session.contract, head_size=256)
    found = find_row_invariance((session, [SWEEP]), (session, []))
    assert (found.chain, found.widest, min(found.boundaries)) == (1, 32, 100)
    # Nothing is claimed far from it.
    assert max(found.boundaries) < 108


def test_boundaries_seen_from_a_padded_pass():
    """Where width 1 differs, plain decoding is fed two tokens, and so reaches a total one token earlier."""
    session = FaultySession(lambda length, width, row: width == 1, path=lambda length, width: length + width >= 100)
    found = find_row_invariance((session, [SWEEP]), (session, []))
    assert (found.chain, found.widest, found.boundaries) == (2, 32, (100,))


def test_drafts_before_a_boundary():
    found = RowInvariance(chain=1, widest=32, boundaries=(100, 200))
    # After 97 positions: plain totals 98 and 99 are below the boundary, the next would be on it.
    assert [found.drafts_before_boundary(length) for length in (67, 97, 98, 99, 198, 199)] == [31, 1, 0, 99, 0, 32]
    assert RowInvariance(chain=1, widest=9).drafts_before_boundary(5) == 9


def test_drafts_that_leak_into_earlier_positions_are_found():
    assert chain_of(FaultySession(leak=lambda length, width: width > 1)) is None


def test_a_fault_in_one_place_of_one_width_is_found():
    assert range_of(lambda length, width, row: width == 13 and row == 0 and length == 77) == (1, 12)


def test_a_fault_in_the_cache_alone_is_found():
    session = FaultySession()
    honest = session.run_logits

    def run_logits(token_ids, cache_length, num_logits_rows):
        logits = honest(token_ids, cache_length, num_logits_rows)
        if len(token_ids) == 9 and cache_length > 3:
            session.caches[0][1][0, 0, cache_length] += 1
        return logits

    session.run_logits = run_logits
    found = find_row_invariance((session, [SWEEP]), (session, []))
    assert (found.chain, found.widest) == (10, 32)


def test_sweeps_stay_inside_the_cache():
    contract = FaultySession().contract
    for cut_down, whole in (full_sweeps(contract), brief_sweeps(contract)):
        for sweep in cut_down + whole:
            assert sweep.lengths
            assert sweep.last + max(sweep.widths) <= contract.max_length
