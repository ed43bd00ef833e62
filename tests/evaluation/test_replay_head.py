"""Replays with a draft head: exactly the rounds of a run, and steps at the price that was named."""

import numpy as np
import pytest

import runtime
from engines.directory import open_directory
from evaluation.replay import simulate
from evaluation.replay_conditions import ReplayConditions
from evaluation.traces import read_trace
from quasar.errors import GenerationError
from tests.plugins.cpu.operators import needs_library

pytestmark = needs_library


def test_a_run_is_replayed_round_by_round(head_engine, tmp_path):
    ran = []
    with runtime.load(head_engine, threads=1) as loaded, runtime.Recorder(tmp_path / "trace") as recorder:
        for length in (5, 60, 300):
            prompt = np.arange(length) * 11 % 250
            done = loaded.generate(
                prompt, drafter="eagle", num_draft_tokens=6, max_new_tokens=40, ignore_eos=True, recorder=recorder
            )
            ran.append(done.stats)
    vocab_size, generations = read_trace(tmp_path / "trace")
    conditions = ReplayConditions.read(head_engine, None, vocab_size, with_head=True, head_step_ms=0.5)
    found = simulate(generations, conditions, "eagle", num_draft_tokens=6, count_drafting=False)
    assert (found["drafted"], found["accepted"], found["rounds"]) == tuple(
        sum(getattr(one, name) for one in ran) for name in ("drafted", "accepted", "rounds")
    )
    # At least one step a round, each of half a millisecond or more.
    assert found["draft_ms_per_round"] >= 0.5
    again = simulate(generations, conditions, "eagle", num_draft_tokens=6, count_drafting=False)
    assert again["draft_ms_per_round"] == pytest.approx(found["draft_ms_per_round"], rel=0.05)
    dear = ReplayConditions.read(head_engine, None, vocab_size, with_head=True, head_step_ms=1000.0)
    # The controller leaves a head alone that takes a second a step, but for trials.
    assert simulate(generations, dear, "auto", count_drafting=False)["rounds"] > 0


def test_what_it_needs_is_said(head_engine, shared_engine, tiny_model, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text('{"16": {"1": 9.0, "8": 12.0}}')
    vocab_size = open_directory(head_engine).manifest.contract.vocab_size
    with pytest.raises(GenerationError, match="reads the verifier's hidden states: give --engine DIR"):
        ReplayConditions.read(None, costs, vocab_size, with_head=True)
    with pytest.raises(GenerationError, match="has no draft head that runs here: python -m export add-head"):
        ReplayConditions.read(shared_engine(tiny_model), None, vocab_size, with_head=True)
