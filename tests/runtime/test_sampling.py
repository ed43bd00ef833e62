"""Sampling in the loop: transformers' processors, exact distributions, and the same tokens with any drafter."""

import itertools

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.drafters import Draft, PromptLookup
from runtime.generation_options import GenerationOptions
from runtime.sampling.processors import LogitsChanges
from runtime.testing import TableSession, run_loop

PROMPT = [1, 2, 3, 1, 2]
# What `evaluation verify` is run with, and more.
COMBINATIONS = {
    "plain": {"temperature": 1.0},
    "nucleus": {"temperature": 0.8, "top_p": 0.95},
    "everything": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "min_new_tokens": 2,
        "logit_bias": {0: 1.0, 2: -0.5},
    },
    "excluded": {"temperature": 1.2, "logit_bias": {1: -np.inf}, "min_new_tokens": 3},
    "penalties": {"temperature": 1.0, "repetition_penalty": 0.7, "presence_penalty": -0.5},
}


def table_logits(vocabulary):
    """Logits that depend on the whole context: any wrong position shows."""

    def logits(context):
        value = 7
        for token in context:
            value = (value * 31 + token + 1) % 1000003
        return (np.random.default_rng(value).standard_normal(vocabulary) * 1.5).astype(np.float32)

    return logits


class Knowing:
    """Drafts a known answer, off by one from place `wrong_from` of a draft on."""

    def __init__(self, answer, wrong_from=99):
        self.answer, self.wrong_from = answer, wrong_from

    def propose(self, context, max_tokens):
        start = len(context) - len(PROMPT)
        tokens = np.array(self.answer[start : start + max_tokens], np.int64)
        tokens[self.wrong_from :] = (tokens[self.wrong_from :] + 1) % 5
        return Draft(tokens=tokens)


class Random:
    def __init__(self, vocabulary):
        self.random, self.vocabulary = np.random.default_rng(5), vocabulary

    def propose(self, context, max_tokens):
        return Draft(tokens=self.random.integers(0, self.vocabulary, self.random.integers(0, max_tokens + 1)))


def tokens_of(rounds):
    return [token for step in rounds for token in step.tokens]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_answer_depends_on_the_seed_and_not_on_the_drafter(combination):
    answers = set()
    for seed in range(6):
        options = GenerationOptions(**COMBINATIONS[combination], seed=seed)

        def answer(drafter, k, options=options):
            session = TableSession(next_logits=table_logits(5), vocab_size=5)
            rounds = run_loop(
                session,
                PROMPT,
                drafter=drafter,
                num_draft_tokens=k,
                max_new_tokens=30,
                stop_ids=frozenset([4]),
                options=options,
            )
            return tokens_of(rounds), sum(step.accepted for step in rounds)

        plain, _ = answer(None, 0)
        drafters = [PromptLookup(), Random(5), Knowing(plain), Knowing(plain, 2), Knowing(plain, 0)]
        for drafter, k in itertools.product(drafters, (1, 5, 31)):
            assert answer(drafter, k)[0] == plain
        # A drafter that knows the answer has everything accepted but the last token of each round.
        assert answer(Knowing(plain), 5)[1] >= (len(plain) - 1) * 4 // 6 - 1
        answers.add(tuple(plain))
    # Short ones may coincide.
    assert len(answers) >= 4


def transformers_distribution(options, logits, prompt, answer, end_ids):
    """One row through transformers' processors in float64, presence and frequency as OpenAI defines them."""
    import torch
    from transformers.generation import logits_process as hf

    ids = torch.tensor([[*prompt, *answer]])
    scores = torch.tensor(logits[None].astype(np.float64))
    if options.logit_bias:
        scores = hf.SequenceBiasLogitsProcessor({(one,): float(bias) for one, bias in options.logit_bias.items()})(
            ids, scores
        )
    if options.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(ids, scores)
    for token in range(len(logits)):
        count = answer.count(token)
        scores[0, token] -= options.frequency_penalty * count + options.presence_penalty * (count > 0)
    if options.min_new_tokens:
        scores = hf.MinNewTokensLengthLogitsProcessor(len(prompt), options.min_new_tokens, list(end_ids))(ids, scores)
    if options.temperature != 1:
        scores = hf.TemperatureLogitsWarper(options.temperature)(ids, scores)
    if options.top_k:
        scores = hf.TopKLogitsWarper(options.top_k)(ids, scores)
    if options.top_p < 1:
        scores = hf.TopPLogitsWarper(options.top_p)(ids, scores)
    if options.min_p:
        scores = hf.MinPLogitsWarper(options.min_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_processors_and_filters_are_those_of_transformers(combination):
    from plugins.sample_token import distribution

    options = GenerationOptions(**COMBINATIONS[combination])
    random = np.random.default_rng(2)
    for _ in range(30):
        prompt, answer = random.integers(0, 40, 6).tolist(), random.integers(0, 40, random.integers(0, 6)).tolist()
        logits = (random.standard_normal(40) * 2).astype(np.float32)
        changes = LogitsChanges(options, np.array(prompt), 40, frozenset([7, 9]))
        for token in answer:
            changes.add(token)
        changed = changes.apply(logits.copy(), np.array([*prompt, *answer]))
        expected = transformers_distribution(options, logits, prompt, answer, [7, 9])
        np.testing.assert_allclose(distribution(changed, options.filters), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "combination",
    [one if one in ("nucleus", "everything") else pytest.param(one, marks=pytest.mark.full) for one in COMBINATIONS],
)
def test_exact_enumeration_on_a_tiny_vocabulary(combination):
    """Every answer of up to three tokens over four: its exact probability, and how often 3,000 seeds give it."""
    options = GenerationOptions(**COMBINATIONS[combination])
    logits, end = table_logits(4), 3
    exact: dict[tuple[int, ...], float] = {}

    def enumerate_from(answer, probability):
        if len(answer) == 3 or (answer and answer[-1] == end):
            exact[answer] = probability
            return
        row = logits([*PROMPT, *answer])
        for token, share in enumerate(transformers_distribution(options, row, PROMPT, list(answer), [end])):
            if share > 0:
                enumerate_from((*answer, token), probability * share)

    enumerate_from((), 1.0)
    assert abs(sum(exact.values()) - 1) < 1e-9

    seeds, counts = 3000, dict.fromkeys(exact, 0)
    for seed in range(seeds):
        rounds = run_loop(
            TableSession(next_logits=logits, vocab_size=4),
            PROMPT,
            drafter=PromptLookup() if seed % 2 else None,
            num_draft_tokens=2,
            max_new_tokens=3,
            stop_ids=frozenset([end]),
            options=GenerationOptions(**COMBINATIONS[combination], seed=seed),
        )
        # An answer that has no probability is a KeyError.
        counts[tuple(tokens_of(rounds))] += 1
    # Answers that are expected less than five times are counted together, as the test asks for.
    rare = [answer for answer, share in exact.items() if share * seeds < 5]
    groups = [[answer] for answer in exact if answer not in rare] + ([rare] if rare else [])
    statistic = sum(
        (sum(counts[answer] for answer in group) - seeds * share) ** 2 / (seeds * share)
        for group in groups
        if (share := sum(exact[answer] for answer in group)) * seeds >= 1
    )
    degrees = len(groups) - 1
    # Wilson and Hilferty's approximation of the 99.99 % quantile: one false alarm in 10,000.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_greedy_penalties_bias_and_minimum():
    """Logits that always prefer token 0: what each option makes of it."""
    session = lambda: TableSession(next_logits=lambda context: np.array([3, 2, 1, 0.5], np.float32), vocab_size=4)  # noqa: E731

    def answer(**options):
        rounds = run_loop(
            session(), [1], max_new_tokens=4, stop_ids=frozenset([0]), options=GenerationOptions(**options)
        )
        return tokens_of(rounds)

    assert answer() == [0]
    assert answer(min_new_tokens=2) == [1, 1, 0]
    assert answer(logit_bias={1: 1.5}) == [1, 1, 1, 1]
    assert answer(logit_bias={0: -np.inf, 1: -np.inf}) == [2, 2, 2, 2]
    # 2 / 2.5 < 1: the prompt's token 1 is penalized from the start.
    assert answer(logit_bias={0: -np.inf}, repetition_penalty=2.5) == [2, 1, 1, 1]
    # Presence and frequency count the answer alone.
    assert answer(logit_bias={0: -np.inf}, presence_penalty=1.2) == [1, 2, 1, 1]
    assert answer(logit_bias={0: -np.inf}, frequency_penalty=0.7) == [1, 1, 2, 1]


class TestHook:
    def run(self, hook, drafter=None, **options):
        return run_loop(
            TableSession(next_logits=table_logits(5), vocab_size=5),
            PROMPT,
            drafter=drafter,
            num_draft_tokens=4,
            max_new_tokens=20,
            options=GenerationOptions(logits_processor=hook, **options),
        )

    def test_it_sees_the_context_and_the_drafts_on_the_positions_own_path(self):
        seen = {}

        def no_repeats(context, logits):
            seen[len(context)] = context.tolist()
            changed = logits.copy()
            changed[context[-1]] = -np.inf
            return changed

        plain = tokens_of(self.run(no_repeats, temperature=1.0, seed=4))
        assert all(a != b for a, b in itertools.pairwise([PROMPT[-1], *plain]))
        for drafter in (Random(5), Knowing(plain), Knowing(plain, 2)):
            seen.clear()
            assert tokens_of(self.run(no_repeats, drafter, temperature=1.0, seed=4)) == plain
            assert seen == {len(PROMPT) + place: [*PROMPT, *plain[:place]] for place in range(len(plain))}

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (lambda logits: logits[:-1], r"logits_processor returned shape \(4,\); an array of shape \(5,\)"),
            (lambda logits: logits[None], r"logits_processor returned shape \(1, 5\)"),
            (lambda logits: None, "logits_processor returned NoneType"),
            (lambda logits: logits.astype(int), "logits_processor returned int64; floating-point logits"),
            (lambda logits: logits * np.nan, "the logits are not numbers"),
            (lambda logits: np.full_like(logits, -np.inf), "every token is excluded"),
        ],
    )
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_what_it_returns_is_checked(self, returned, message, temperature):
        with pytest.raises(GenerationError, match=message):
            self.run(lambda context, logits: returned(logits), temperature=temperature)

    def test_it_is_not_called_after_the_end(self):
        """A grammar that is complete allows nothing more; drafts after an end id must not ask it."""
        plain = tokens_of(self.run(None))
        end = plain[6]
        first = plain.index(end) + 1

        def grammar(context, logits):
            assert len(context) - len(PROMPT) < first
            return logits

        for drafter in (None, Knowing(plain)):
            rounds = run_loop(
                TableSession(next_logits=table_logits(5), vocab_size=5),
                PROMPT,
                drafter=drafter,
                num_draft_tokens=9,
                stop_ids=frozenset([end]),
                options=GenerationOptions(logits_processor=grammar),
            )
            assert tokens_of(rounds) == plain[:first]

    def test_the_context_cannot_be_written(self):
        def write(context, logits):
            context[0] = 3
            return logits

        with pytest.raises(ValueError, match="read-only"):
            self.run(write)

    def test_float64_logits_are_taken(self):
        def widen(context, logits):
            return logits.astype(np.float64)

        assert tokens_of(self.run(widen)) == tokens_of(self.run(None))


def test_logprobs_are_the_models_own():
    """Before bias and temperature, over all tokens; the same with drafts."""
    logits = table_logits(5)
    options = {"temperature": 0.5, "logit_bias": {2: 5.0}, "seed": 3, "logprobs": 2}

    def run(drafter):
        return run_loop(
            TableSession(next_logits=logits, vocab_size=5),
            PROMPT,
            drafter=drafter,
            num_draft_tokens=4,
            max_new_tokens=12,
            options=GenerationOptions(**options),
        )

    rounds = run(None)
    entries = [entry for step in rounds for entry in step.logprobs]
    answer = tokens_of(rounds)
    assert [entry.token_id for entry in entries] == answer
    for place, entry in enumerate(entries):
        row = logits([*PROMPT, *answer[:place]]).astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        # float32 logits and exponentials.
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:2].tolist()
        assert [value for _, value in entry.top] == pytest.approx(np.sort(expected)[::-1][:2], abs=1e-5)
    assert [entry for step in run(Knowing(answer)) for entry in step.logprobs] == entries
