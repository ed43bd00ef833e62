"""The driver runs every probe on any session, and its record says what they found."""

import dataclasses

import numpy as np
import pytest

from engines.machine import cpu_machine
from engines.probes.driver import brief_plan, full_plan, run_probes
from engines.record import MachineRecord, keep_record, read_record
from runtime.testing import TableSession

MACHINE = cpu_machine(library="table 1", provider="cpu", threads=1, kernels="table")


class Session(TableSession):
    """A decoder of 70 positions; passes of width 1 have last bits of their own if `narrow_differs`."""

    def __init__(self, *, narrow_differs=False):
        super().__init__(lambda context: (context[-1] + 3) % 50, vocab_size=50, max_length=70)
        self._narrow_differs = narrow_differs

    def run_logits(self, token_ids, cache_length, num_logits_rows, parents=None, /, *, out=None):
        rows = super().run_logits(token_ids, cache_length, num_logits_rows, parents, out=out)
        return np.nextafter(rows, np.float32(1e9)) if self._narrow_differs and len(token_ids) == 1 else rows


@pytest.fixture
def plan():
    return dataclasses.replace(brief_plan(Session().contract), seconds=0.05)


def test_an_exact_session(plan):
    steps = []
    record = run_probes(Session(), MACHINE, plan, on_step=lambda: steps.append(1))
    # A prefill chunk of 256 does not fit 70 positions, so nothing is known of it.
    assert dataclasses.astuple(record.row_invariance) == (1, 32, (), True, False, False)
    assert set(record.cost_surface_ms) == {16, 70}
    assert record.machine == MACHINE.to_json()
    assert not record.exact_integers
    assert len(steps) == plan.count_steps(Session().contract)


@pytest.mark.parametrize("place", ["whole", "cut down"])
def test_what_either_graph_shows_counts(plan, place):
    faulty, exact = Session(narrow_differs=True), Session()
    whole, cut_down = (faulty, exact) if place == "whole" else (exact, faulty)
    plan = dataclasses.replace(plan, whole=plan.cut_down)
    record = run_probes(whole, MACHINE, plan, cut_down=cut_down, exact_integers=True)
    assert record.row_invariance.chain == 2
    assert record.exact_integers


def test_a_full_plan_looks_at_more(plan):
    contract = Session().contract
    assert full_plan(contract).count_steps(contract) > plan.count_steps(contract)
    assert full_plan(contract).prefill_positions is None


def test_a_record_is_kept_and_read(plan, tmp_path):
    record = run_probes(Session(), MACHINE, plan)
    path = tmp_path / "machines" / "one.json"
    assert read_record(path) is None
    keep_record(path, record)
    assert read_record(path) == record == MachineRecord.from_json(record.to_json())
    path.write_text("{")
    assert read_record(path) is None
