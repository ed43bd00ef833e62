"""Training: it learns, it goes on after a kill as if there had been none, it ends in time."""

import math

import numpy as np
import pytest

from calibration.draft_heads import training as training_module
from calibration.draft_heads.pace import Pace
from calibration.draft_heads.training import Training, by_prompt, split
from tests.calibration.draft_heads.heads import (
    drafted_tokens,
    random_sequence,
    random_tensors,
    tiny_model,
    tiny_spec,
)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def sequences():
    return [random_sequence(number, 40 + number % 7) for number in range(24)]


@pytest.fixture
def make_training(tmp_path, sequences):
    def make(pace, clock=lambda: 0.0, name="training", bfloat16=False):
        spec = tiny_spec()
        model, _ = tiny_model(spec, random_tensors(spec))
        return Training(
            model,
            *split(sequences),
            drafted_tokens(),
            pace,
            seed=5,
            checkpoint=tmp_path / f"{name}.safetensors",
            peak_rate=1e-2,
            bfloat16=bfloat16,
            clock=clock,
        )

    return make


def counted(updates):
    return Pace(seconds=math.inf, most_updates=updates)


def test_it_learns(make_training):
    training = make_training(counted(24))
    before = training.estimate()
    reports = []
    training.run(reports.append)
    assert training.losses[-1] < 0.8 * training.losses[0]
    assert reports[-1].estimate.coverage["8"][0] > before.coverage["8"][0]
    assert reports[-1].progress == pytest.approx(1)


def test_operands_of_16_bits_learn_the_same(make_training):
    whole, rounded = make_training(counted(12), name="whole"), make_training(counted(12), name="rounded", bfloat16=True)
    for training in (whole, rounded):
        training.run(lambda progress: None)
    assert rounded.losses != whole.losses
    # Operands are rounded to 8 bits: the losses of a few updates follow those without.
    np.testing.assert_allclose(rounded.losses, whole.losses, rtol=0.03)
    assert all(tensor.dtype == np.float32 for tensor in rounded.model.tensors().values())


def test_a_killed_training_makes_the_same_head(make_training, monkeypatch):
    whole = make_training(counted(5), name="whole")
    whole.run(lambda progress: None)
    # A checkpoint after every update.
    monkeypatch.setattr(training_module, "_SECONDS", 0.0)
    heard = []

    def kill(progress):
        heard.append(progress)
        if len(heard) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        make_training(counted(5)).run(kill)
    again = make_training(counted(5))
    # The third checkpoint was not written.
    assert again.pace.updates == 2
    again.run(lambda progress: None)
    assert again.pace.updates == 5
    for name, value in whole.model.tensors().items():
        np.testing.assert_array_equal(again.model.tensors()[name], value)


def test_a_finished_training_is_not_gone_on_with(make_training):
    make_training(counted(2)).run(lambda progress: None)
    again = make_training(counted(2))
    again.run(lambda progress: None)
    assert again.pace.updates == 2


def test_the_clock_ends_it(make_training):
    moments = iter(range(100000))
    training = make_training(Pace(seconds=12, most_updates=10**6), clock=lambda: float(next(moments)))
    training.run(lambda progress: None)
    assert 8 <= training.pace.spent <= 14
    assert training.pace.is_done


def test_rates_rise_and_fall():
    pace = counted(50)
    rates = []
    while not pace.is_done:
        rates.append(pace.rate(1.0))
        pace.advance(1.0)
    assert len(rates) == 50
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates[-1] < 0.05
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_slower_machine_makes_fewer_updates():
    quick, slow = (Pace(seconds=100, most_updates=10**6) for _ in range(2))
    while not quick.is_done:
        quick.advance(1.0)
    while not slow.is_done:
        # It becomes slow on the way.
        slow.advance(1.0 if slow.updates < 20 else 4.0)
    assert quick.updates == 100
    assert slow.spent == 100
    assert slow.updates == 40


def test_whole_sequences_are_held_out(sequences):
    learned, held_out = split(sequences)
    assert [one.number for one in held_out] == [10]
    assert len(learned) == 23
    assert [len(part) for part in split(sequences[:2])] == [1, 1]


def test_all_answers_to_a_prompt_are_held_out_or_none(sequences):
    """24 sequences of 12 prompts, each answered twice."""
    learned, held_out = split(sequences, 12)
    assert [one.number for one in held_out] == [10, 22]
    assert not {one.number % 12 for one in learned} & {10}
    assert by_prompt(sequences[::2], 12) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert [len(part) for part in split(sequences, 4)] == [18, 6]


def test_estimates_on_the_way_look_at_fewer_blocks(make_training, monkeypatch):
    seen = []
    honest, whole = training_module.estimate, training_module.pack
    monkeypatch.setattr(
        training_module,
        "estimate",
        lambda model, blocks, tokens: seen.append(len(blocks)) or honest(model, blocks, tokens),
    )
    monkeypatch.setattr(training_module, "_SECONDS", 0.0)
    monkeypatch.setattr(training_module, "_BLOCKS_ON_THE_WAY", 1)
    monkeypatch.setattr(training_module, "pack", lambda one, order: whole(one, order, 16))
    make_training(counted(3)).run(lambda progress: None)
    assert seen == [1, 1, 3]


def test_a_head_is_unrolled_further_and_further():
    pace = counted(20)
    steps = []
    while not pace.is_done:
        steps.append(pace.steps(4))
        pace.advance(0.0)
    assert steps == [1] * 6 + [2] * 3 + [3] * 3 + [4] * 8
