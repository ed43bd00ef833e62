"""The compiled sampler draws the reference's tokens, on every instruction level."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.cpu import toolchain
from plugins.cpu.sampler import NativeSampler
from plugins.sample_token import Filters, sample_token
from quasar.errors import GenerationError, QuasarError
from tests.plugins.cpu.operators import LEVELS, needs_library

pytestmark = needs_library


@pytest.fixture(params=LEVELS)
def sampler(request, monkeypatch):
    monkeypatch.setenv("QUASAR_CPU_LEVEL", request.param)
    return NativeSampler(toolchain.LIBRARY)


filters = st.builds(
    Filters,
    temperature=st.sampled_from([0.05, 0.5, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 300, 10**6]),
    top_p=st.sampled_from([0.01, 0.3, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


def test_it_draws_the_references_tokens(sampler):
    @settings(deadline=None, max_examples=150, database=None, derandomize=True)
    @given(
        filters=filters,
        vocabulary=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 320, 1023, 1024, 1040, 3000]),
        spread=st.sampled_from([0.0, 0.1, 1.0, 6.0]),
        ties=st.booleans(),
        excluded=st.sampled_from([0.0, 0.5, 0.99]),
        seed=st.integers(0, 2**64 - 1),
        position=st.integers(0, 10**6),
    )
    def draws_agree(filters, vocabulary, spread, ties, excluded, seed, position):
        random = np.random.default_rng(seed % 2**32)
        logits = (random.standard_normal(vocabulary) * spread).astype(np.float32)
        if ties:
            logits = np.round(logits)
        logits[random.random(vocabulary) < excluded] = -np.inf
        logits[random.integers(vocabulary)] = 0.5
        expected = sample_token(logits, filters, seed=seed, position=position)
        assert sampler(logits, filters, seed=seed, position=position) == expected

    draws_agree()


def test_whole_vocabularies(sampler):
    random = np.random.default_rng(1)
    for place, vocabulary in enumerate([49152, 151936] * 2):
        logits = (random.standard_normal(vocabulary) * (1 + place)).astype(np.float32)
        for chosen in (Filters(), Filters(temperature=0.8, top_p=0.95), Filters(top_k=50, min_p=0.01)):
            for position in range(5):
                expected = sample_token(logits, chosen, seed=3, position=position)
                assert sampler(logits, chosen, seed=3, position=position) == expected


def test_a_row_of_a_larger_array(sampler):
    rows = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    strided = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32).T
    for logits in (*rows, *strided):
        expected = sample_token(logits.copy(), Filters(), seed=1, position=2)
        assert sampler(logits, Filters(), seed=1, position=2) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "the logits are not numbers"), (np.inf, "the logits are not numbers"), (-np.inf, "every token is excl")],
)
def test_logits_that_nothing_can_be_drawn_from(sampler, bad, message):
    for place in (0, 17, 39):
        logits = np.full(40, bad if bad == -np.inf else 0, np.float32)
        logits[place] = bad
        with pytest.raises(GenerationError, match=message):
            sampler(logits, Filters(), seed=0, position=0)


def test_a_level_that_is_not_there(monkeypatch):
    monkeypatch.setenv("QUASAR_CPU_LEVEL", "abacus")
    with pytest.raises(QuasarError, match="QUASAR_CPU_LEVEL names a level that is unknown"):
        NativeSampler(toolchain.LIBRARY)
