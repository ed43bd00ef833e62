"""sample_token against its definition: the filtered softmax, transformers' own filters, numpy's Philox."""

import numpy as np
import pytest

from plugins.sample_token import Filters, distribution, gumbel_noise, sample_token
from quasar.errors import FaultError, GenerationError

FILTERS = [
    Filters(),
    Filters(temperature=0.8, top_p=0.95),
    Filters(temperature=1.7, top_k=3),
    Filters(top_k=4, top_p=0.7),
    Filters(min_p=0.2),
    Filters(temperature=0.7, top_k=5, top_p=0.9, min_p=0.05),
    Filters(top_p=0.05),
]


def rows(count, vocabulary, seed=0, spread=3.0):
    return (np.random.default_rng(seed).standard_normal((count, vocabulary)) * spread).astype(np.float32)


def transformers_distribution(logits, filters):
    """Its warpers in its order, in float64: float32 sums would blur where top_p cuts."""
    import torch
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits[None].astype(np.float64))
    warpers = [hf.TemperatureLogitsWarper(filters.temperature)]
    warpers += [hf.TopKLogitsWarper(filters.top_k)] if filters.top_k else []
    warpers += [hf.TopPLogitsWarper(filters.top_p)] if filters.top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(filters.min_p)] if filters.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 7, 50, 3000])
def test_filters_are_those_of_transformers(filters, vocabulary):
    for logits in rows(20, vocabulary, seed=vocabulary):
        # Both in float64; the issue is which tokens stay, and 1e-6 is far below any of them.
        np.testing.assert_allclose(
            distribution(logits, filters), transformers_distribution(logits, filters), atol=1e-6, rtol=0
        )


def test_ties_with_the_last_of_top_k_stay_as_in_transformers():
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    filters = Filters(top_k=2)
    assert np.flatnonzero(distribution(logits, filters)).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(distribution(logits, filters), transformers_distribution(logits, filters), atol=1e-6)
    assert {sample_token(logits, filters, seed=seed, position=0) for seed in range(200)} == {1, 2, 3, 4}


def test_top_p_keeps_the_lower_ids_of_a_tie():
    logits = np.zeros(4, np.float32)
    assert np.flatnonzero(distribution(logits, Filters(top_p=0.5))).tolist() == [0, 1]
    drawn = {sample_token(logits, Filters(top_p=0.5), seed=seed, position=0) for seed in range(100)}
    assert drawn == {0, 1}


def test_the_winner_is_the_largest_logit_plus_noise():
    """Every filter: the maximum over exactly the tokens that the definition keeps."""
    for index, logits in enumerate(rows(150, 60, seed=4)):
        for filters in FILTERS:
            kept = np.flatnonzero(distribution(logits, filters))
            noise = gumbel_noise(kept, seed=9, position=index)
            best = kept[np.argmax(logits[kept].astype(np.float64) / filters.temperature + noise)]
            assert sample_token(logits, filters, seed=9, position=index) == best


def test_noise_comes_from_numpys_philox():
    """Token 300 is member 2 of block 28."""

    def words(stream, count):
        counter = np.array([0, 5, stream, 0], np.uint64)
        return np.random.Philox(key=np.array([77, 1], np.uint64), counter=counter).random_raw(count).tolist()

    word, more = words(0, 29)[28], words(1, 28 * 16 + 16)[28 * 16 :]
    least = -np.log(((word >> 4) + 0.5) / 2**60) / 16
    expected = [least + (0 if member == word % 16 else -np.log((more[member] + 0.5) / 2**64)) for member in range(16)]
    tokens = 256 + 12 + 16 * np.arange(16)
    # A few roundings of log.
    np.testing.assert_allclose(gumbel_noise(tokens, seed=77, position=5), -np.log(expected), rtol=1e-9)
    np.testing.assert_allclose(gumbel_noise(np.array([300]), seed=77, position=5), -np.log(expected[2]), rtol=1e-9)


def test_noise_is_independent_and_gumbel():
    """Blocks are drawn from their least exponential on; what comes out must not show it."""
    noise = np.stack([gumbel_noise(np.arange(512), seed=seed, position=3) for seed in range(400)])
    exponentials = np.sort(np.exp(-noise).reshape(-1))
    # Kolmogorov's distance of 204,800 draws from Exp(1): 1.95 / sqrt(n) is passed once in 1,000 tests.
    place = (np.arange(len(exponentials)) + 0.5) / len(exponentials)
    assert np.abs(1 - np.exp(-exponentials) - place).max() < 1.95 / len(exponentials) ** 0.5
    # Ranks are uniform: the mean correlation of members of one block, and of neighbours, is that of chance.
    ranks = np.exp(-np.exp(-noise)) - 0.5
    block = ranks[:, 16 * np.arange(16) + 3]
    within = (block.sum(axis=1) ** 2 - (block**2).sum(axis=1)).mean() / (16 * 15 / 12)
    neighbours = (ranks[:, 1:] * ranks[:, :-1]).mean() * 12
    # Four standard deviations of such means over 400 seeds.
    assert abs(within) < 4 / (400 * 16 * 15 / 2) ** 0.5
    assert abs(neighbours) < 4 / (400 * 511) ** 0.5


def test_a_grid_of_uniforms_gives_the_softmax():
    """Exact enumeration: the Gumbel-max rule over every combination of a grid of uniforms for three tokens."""
    cells = 128
    noise = -np.log(-np.log((np.arange(cells) + 0.5) / cells))
    logits = np.array([0.3, -0.4, 1.1])
    totals = [logits[token] + noise for token in range(3)]
    a, b, c = np.meshgrid(*totals, indexing="ij")
    won = np.stack([a > np.maximum(b, c), b > np.maximum(a, c), c > np.maximum(a, b)]).mean(axis=(1, 2, 3))
    # A cell is 1/128 wide in each direction; what it gets wrong lies on the borders between winners.
    np.testing.assert_allclose(won, np.exp(logits) / np.exp(logits).sum(), atol=1 / cells)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_frequencies_are_those_of_the_definition(filters):
    """Chi-square over 4,000 seeds and a vocabulary of 8; the quantile is that of one failure in 10,000."""
    logits = rows(1, 8, seed=3, spread=1.5)[0]
    expected = distribution(logits, filters)
    counts = np.bincount([sample_token(logits, filters, seed=seed, position=11) for seed in range(4000)], minlength=8)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts[kept] - 4000 * expected[kept]) ** 2 / (4000 * expected[kept])).sum()
    # 99.99 % quantiles of chi-square with 0 to 7 degrees of freedom.
    assert statistic <= [1e-9, 15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88][kept.sum() - 1]


def test_positions_and_seeds_draw_independently():
    logits = np.zeros(2, np.float32)
    by_position = np.array([sample_token(logits, Filters(), seed=1, position=place) for place in range(2000)])
    by_seed = np.array([sample_token(logits, Filters(), seed=seed, position=1) for seed in range(2000)])
    for drawn in (by_position, by_seed):
        # Four standard deviations of a fair coin's mean, and of its correlation with the next throw.
        assert abs(drawn.mean() - 0.5) < 4 * 0.5 / 2000**0.5
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / 2000**0.5


def test_the_same_arguments_draw_the_same_token():
    logits = rows(1, 1000)[0]
    first = [sample_token(logits, Filters(top_p=0.9), seed=2**64 - 1, position=place) for place in range(50)]
    again = [sample_token(logits.copy(), Filters(top_p=0.9), seed=2**64 - 1, position=place) for place in range(50)]
    assert first == again
    assert len(set(first)) > 5


def test_excluded_tokens_are_never_drawn():
    logits = np.full(40, -np.inf, np.float32)
    logits[[3, 39]] = [0, 1]
    for filters in FILTERS:
        assert {sample_token(logits, filters, seed=seed, position=0) for seed in range(60)} <= {3, 39}


@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "the logits are not numbers"), (np.inf, "the logits are not numbers"), (-np.inf, "every token is excl")],
)
def test_logits_that_nothing_can_be_drawn_from(bad, message):
    with pytest.raises(GenerationError, match=message) as raised:
        sample_token(np.full(5, bad, np.float32), Filters(), seed=0, position=0)
    assert isinstance(raised.value, FaultError) == (bad != -np.inf)
