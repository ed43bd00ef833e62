"""The unrolled steps are those of a head that drafts, one chain at a time and position by position."""

import dataclasses

import numpy as np
import pytest
import torch

from calibration.draft_heads.acceptance_estimate import estimate
from calibration.draft_heads.head_loss import DECAY, STATES, chains_of, head_loss
from calibration.draft_heads.packed_blocks import draft_numbers, pack, torch_block
from calibration.draft_heads.sampled_tokens import sampled_tokens_of
from calibration.draft_heads.unrolled import unrolled_states
from tests.calibration.draft_heads.heads import (
    DRAFTED,
    SCALES,
    drafted_tokens,
    random_sequence,
    random_tensors,
    tiny_model,
    tiny_spec,
)
from tests.draft_head_reference import CanonicalHead

STEPS = 4
LENGTHS = (9, 14, 6)


@pytest.fixture(scope="module")
def head():
    spec = tiny_spec()
    tensors = random_tensors(spec)
    model, target = tiny_model(spec, tensors)
    return spec, tensors, model, target


@pytest.fixture(scope="module")
def sequences():
    return [random_sequence(number, length) for number, length in enumerate(LENGTHS)]


def block_of(sequences):
    tokens = drafted_tokens()
    [pieces] = pack(sequences, range(len(sequences)), 64)
    return torch_block(pieces, draft_numbers(tokens, 96))


def drafted(head, sequence, position, steps):
    """Logits and hidden states, by step, of a head that drafts after `position + 1` tokens and one more."""
    spec, tensors, _, target = head
    reference = CanonicalHead(spec, tensors, embedding=target.embedding)
    count = position + 1
    hidden = reference.hidden(target.normed(torch.from_numpy(sequence.features[:count].astype(np.float32))))
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    logits, hidden = reference.step(ids[1 : count + 1], hidden, torch.arange(count), causal)
    found = [(logits[-1], hidden[-1])]
    for step in range(1, steps):
        seen = torch.ones(1, count + step, dtype=torch.bool)
        at = torch.tensor([position + step])
        logits, hidden = reference.step(ids[count + step : count + step + 1], hidden[-1:], at, seen)
        found.append((logits[-1], hidden[-1]))
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def test_every_chain_is_what_the_head_drafts(head, sequences):
    model = head[2]
    block = block_of(sequences)
    chains = chains_of(block, STEPS)
    with torch.no_grad():
        steps = [(going, model.logits(hidden)) for going, hidden in unrolled_states(model, block, chains, STEPS)]
    first, compared = 0, 0
    for sequence in sequences:
        for position in range(len(sequence) - 1):
            if first + position not in chains:
                continue
            # The token that a step is fed, and the target that it is compared with, are of the sequence.
            steps_here = min(STEPS, len(sequence) - 1 - position)
            expected, _ = drafted(head, sequence, position, steps_here)
            for step, (going, logits) in enumerate(steps):
                row = (going == first + position).nonzero()
                assert len(row) == (step < steps_here)
                if step < steps_here:
                    # Sums of float32 terms up to the row's largest, in another order.
                    largest = float(expected[step].abs().max())
                    torch.testing.assert_close(logits[int(row)], expected[step], rtol=0, atol=1e-5 * largest)
                    compared += 1
        first += len(sequence)
    assert compared > 50


def test_chains_begin_where_something_is_learned(sequences):
    block = block_of(sequences)
    assert chains_of(block, 1).tolist() == [
        first + position
        for first, length in zip((0, 9, 23), LENGTHS, strict=True)
        # Its target is of the position after it, where somebody asked.
        for position in range(1, length - 1)
    ]
    # A chain that is in the prompt at first may be in the answer later.
    assert chains_of(block, 2)[0] == 0


def test_the_loss_is_the_mean_of_each_step(head, sequences):
    _, _, model, target = head
    numbers = draft_numbers(drafted_tokens(), 96)
    scale = torch.from_numpy(SCALES.hidden)
    block = block_of(sequences)
    by_step = [[] for _ in range(STEPS)]
    for sequence in sequences:
        for position in range(len(sequence) - 1):
            logits, guessed = drafted(head, sequence, position, min(STEPS, len(sequence) - 1 - position))
            for step, (row, guess) in enumerate(zip(logits, guessed, strict=True)):
                at = position + 1 + step
                shares = np.exp(sequence.log_probabilities[at].astype(np.float64))
                if not shares.any():
                    continue
                logs = row.double().log_softmax(-1).numpy()
                loss = -sum(
                    share * logs[numbers[token]]
                    for share, token in zip(shares, sequence.likely[at], strict=True)
                    if numbers[token] >= 0
                )
                state = target.normed(torch.from_numpy(sequence.features[at : at + 1].astype(np.float32)))
                apart = (guess - state[0]).abs() / scale
                by_step[step].append(loss + STATES * float(torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean()))
    weight = sum(DECAY**step for step in range(STEPS))
    expected = sum(DECAY**step * np.mean(losses) for step, losses in enumerate(by_step)) / weight
    assert float(head_loss(model, block, STEPS).detach()) == pytest.approx(expected, rel=1e-5)


def loss_of(loss):
    return float(loss.detach())


def test_a_sample_stands_for_unlikely_tokens(head, sequences, monkeypatch):
    """In the mean over samples the sum of exponentials is that of all tokens; its logarithm is a little less."""
    model = head[2]
    block = block_of(sequences)
    whole = loss_of(head_loss(model, block, 2))
    assert sampled_tokens_of(block, DRAFTED, np.random.default_rng(0)) is None
    assert loss_of(head_loss(model, block, 2, np.random.default_rng(0))) == whole
    # Few likely tokens, so that others are left.
    block = dataclasses.replace(block, shares=torch.where(torch.arange(32) < 3, block.shares, 0))
    whole = loss_of(head_loss(model, block, 2))
    monkeypatch.setattr("calibration.draft_heads.sampled_tokens.SAMPLED", 6)
    found = sampled_tokens_of(block, DRAFTED, np.random.default_rng(0))
    likely = block.shares > 0
    assert (found.rows[found.ids] == block.draft_ids)[likely].all()
    assert len(found.rows) < DRAFTED
    assert found.log_counts.exp().sum() == pytest.approx(DRAFTED, rel=1e-6)
    sampled = [loss_of(head_loss(model, block, 2, np.random.default_rng(seed))) for seed in range(200)]
    assert np.std(sampled) > 0
    assert whole - 0.02 < np.mean(sampled) < whole + 3 * np.std(sampled) / len(sampled) ** 0.5
    # The same sample, the same loss.
    assert loss_of(head_loss(model, block, 2, np.random.default_rng(7))) == sampled[7]


def test_gradients_reach_every_parameter(head, sequences):
    model = head[2]
    head_loss(model, block_of(sequences), STEPS).backward()
    for name, parameter in model.parameters.items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
        parameter.grad = None


def test_the_estimate_counts_what_agrees(head, sequences):
    _, _, model, _ = head
    tokens = drafted_tokens()
    found = estimate(model, [block_of(sequences)], tokens)
    same = np.zeros(5)
    seen = np.zeros(5)
    emitted = np.zeros(5)
    starts = 0
    for sequence in sequences:
        for position in range(1, len(sequence) - 1):
            logits, _ = drafted(head, sequence, position, min(5, len(sequence) - 1 - position))
            right = [
                tokens[int(row.argmax())] == sequence.likely[position + 1 + step, 0] for step, row in enumerate(logits)
            ]
            same[: len(right)] += right
            seen[: len(right)] += 1
            if sequence.greedy:
                starts += 1
                emitted[: len(right)] += np.cumprod(right)
    assert found.agreement == pytest.approx((same / seen).tolist(), abs=1e-4)
    assert found.chain == pytest.approx((1 + np.cumsum(emitted) / starts).tolist(), abs=1e-3)
    assert found.positions == seen[0]
    assert found.coverage["8"][0] >= found.coverage["1"][0]


def test_long_sequences_are_cut_and_keep_their_positions():
    sequence = random_sequence(0, 21)
    blocks = pack([sequence], [0], 8)
    assert [[(piece.first, piece.end) for piece in block] for block in blocks] == [[(0, 8)], [(8, 16)], [(16, 21)]]
    block = torch_block(blocks[1], draft_numbers(drafted_tokens(), 96))
    assert block.positions.tolist() == list(range(8, 16))
    assert block.ends.tolist() == [8] * 8


def test_blocks_hold_every_position_once():
    sequences = [random_sequence(number, length) for number, length in enumerate((5, 9, 3, 8, 12, 1, 7, 30))]
    blocks = pack(sequences, [3, 1, 7, 0, 2, 6, 5, 4], 12)
    assert all(sum(map(len, block)) <= 12 for block in blocks)
    places = [
        (piece.sequence.number, at) for block in blocks for piece in block for at in range(piece.first, piece.end)
    ]
    assert len(places) == len(set(places)) == sum(map(len, sequences))
