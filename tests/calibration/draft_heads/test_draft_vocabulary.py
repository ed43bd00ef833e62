"""Which tokens a head can draft."""

import numpy as np
import pytest

from calibration.draft_heads.draft_vocabulary import choose_vocabulary, coverage_of, token_masses
from tests.calibration.draft_heads.heads import random_sequence


def test_masses_are_sums_of_probabilities():
    sequences = [random_sequence(number, 12) for number in range(3)]
    masses = token_masses(sequences, 96)
    expected = np.zeros(96)
    for sequence in sequences:
        for ids, logs in zip(sequence.likely, sequence.log_probabilities, strict=True):
            for token, log in zip(ids, logs, strict=True):
                expected[token] += np.exp(np.float32(log))
    np.testing.assert_allclose(masses, expected, rtol=1e-5)
    assert masses.sum() == pytest.approx(3 * 10, rel=1e-2)


def test_coverage_decides_the_size():
    # A few tokens of much, many of little.
    masses = np.full(60000, 0.001)
    masses[np.arange(100) * 7] = 50.0
    chosen = choose_vocabulary([masses], always=())
    assert len(chosen.tokens) == 4096
    assert chosen.coverage > 0.985
    masses = np.ones(60000)
    assert len(choose_vocabulary([masses], always=()).tokens) == 32000
    masses = np.where(np.arange(60000) < 10000, 1.0, 0.0)
    chosen = choose_vocabulary([masses], always=())
    assert 9850 <= len(chosen.tokens) < 9850 + 64
    assert len(chosen.tokens) % 64 == 0
    assert chosen.coverage >= 0.985


def test_special_tokens_are_always_in():
    masses = np.arange(1000, 0, -1).astype(float)
    chosen = choose_vocabulary([masses], always={999, 500}, size=64)
    assert chosen.tokens.tolist() == [*range(62), 500, 999]
    assert chosen.coverage == pytest.approx(coverage_of(masses, chosen.tokens))


def test_reserved_tokens_do_not_fill_it():
    masses = np.zeros(4000)
    masses[[3, 3001]] = 1
    chosen = choose_vocabulary([masses], always=range(3000, 4000), size=64)
    assert 3001 in chosen.tokens
    assert np.count_nonzero(chosen.tokens >= 3000) == 1


def test_small_vocabularies_are_whole():
    assert choose_vocabulary([np.ones(320)], always=()).tokens.tolist() == list(range(320))


def test_what_one_part_does_not_name_is_not_covered():
    """Each half knows its own tokens alone: by ids, all that are below must be in."""
    first, second = np.zeros(20000), np.zeros(20000)
    first[:10000:2], second[1:10000:2] = 1, 1
    assert 9800 <= len(choose_vocabulary([first, second], always=()).tokens) < 15000
    assert len(choose_vocabulary([first + second], always=()).tokens) < 9900
    assert choose_vocabulary([first, first], always=(), size=None).coverage > 0.985
