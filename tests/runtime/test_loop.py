"""The loop against plain decoding, token by token and of equal length, with drafters of every kind."""

import time

import numpy as np
import pytest

from engines.probes.row_invariance import RowInvariance
from quasar.errors import ContextLimitError, GenerationError
from runtime.acceptance import follow
from runtime.control.control import NoControl
from runtime.drafters import Draft, PromptLookup, Recycling, Suffix
from runtime.kv_cache import KVCache
from runtime.sequence import check_prompt
from runtime.testing import TableSession, run_loop

EXACT = RowInvariance(chain=1, widest=32)
TREES = RowInvariance(chain=1, widest=32, tree=True)


def hashed(context):
    """A target that depends on the whole context: any wrong position shows."""
    value = 7
    for token in context:
        value = (value * 31 + token + 1) % 1000003
    return value % 100


def looping(context):
    """A target that falls into a loop of seven, as small models do."""
    return (len(context) // 2) % 7


class Oracle:
    """Drafts what the target will say, up to `right` tokens, then something else."""

    def __init__(self, target, right):
        self.target, self.right = target, right

    def propose(self, context, max_tokens):
        sequence = context.tolist()
        for place in range(max_tokens):
            token = self.target(sequence)
            sequence.append(token if place < self.right else (token + 1) % 100)
        return Draft(tokens=np.array(sequence[len(context) :], np.int64))


class Trees:
    """Random trees, with the target's path in some of them."""

    def __init__(self, target, seed):
        self.target, self.random = target, np.random.default_rng(seed)

    def propose(self, context, max_tokens):
        tokens, parents, paths = [], [], [context.tolist()]
        for place in range(int(self.random.integers(0, max_tokens + 1))):
            parent = int(self.random.integers(-1, place))
            right = self.target(paths[parent + 1])
            token = right if self.random.random() < 0.6 else int(self.random.integers(0, 100))
            if (parent, token) in zip(parents, tokens, strict=True):
                token = (token + 1) % 100
            parents.append(parent)
            tokens.append(token)
            paths.append([*paths[parent + 1], token])
        return Draft(tokens=np.array(tokens, np.int64), parents=np.array(parents, np.int64))


class Random:
    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def propose(self, context, max_tokens):
        return Draft(tokens=self.random.integers(0, 100, self.random.integers(0, max_tokens + 1)))


class Empty:
    def propose(self, context, max_tokens):
        return Draft(tokens=np.empty(0, np.int64))


def run(target, drafter, *, prompt=(1, 2, 3), max_new_tokens=40, stop_ids=(), k=5, exact=EXACT, **session):
    table = TableSession(target, **session)
    rounds = run_loop(
        table,
        prompt,
        drafter=drafter,
        num_draft_tokens=k if drafter else 0,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(stop_ids),
        exact=exact,
    )
    return [token for step in rounds for token in step.tokens], rounds, table


def expected(target, prompt, count, stop_ids=()):
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(target(sequence))
        if sequence[-1] in stop_ids:
            break
    return sequence[len(prompt) :]


DRAFTERS = {
    "none": lambda target: None,
    "right": lambda target: Oracle(target, 99),
    "wrong": lambda target: Oracle(target, 0),
    "right-then-wrong": lambda target: Oracle(target, 2),
    "random": lambda target: Random(4),
    "empty": lambda target: Empty(),
    "lookup": lambda target: PromptLookup(),
    "earliest": lambda target: PromptLookup(match="earliest"),
    "suffix": lambda target: Suffix(),
    "recycling": lambda target: Recycling(),
}


@pytest.mark.parametrize("target", [hashed, looping])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("k", [1, 5, 31])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_tokens_are_those_of_plain_decoding(target, drafter, k, count):
    tokens, rounds, _ = run(target, DRAFTERS[drafter](target), k=k, max_new_tokens=count)
    assert tokens == expected(target, (1, 2, 3), count)
    assert rounds[-1].finish_reason == "length"
    assert all(step.finish_reason is None for step in rounds[:-1])


@pytest.mark.parametrize("target", [hashed, looping])
@pytest.mark.parametrize("k", [1, 5, 31])
@pytest.mark.parametrize("chain", [1, 3])
@pytest.mark.parametrize(
    "drafter",
    [lambda target: Trees(target, 5), lambda target: Suffix(branches=3), lambda target: Recycling(branches=4)],
    ids=["random", "suffix", "recycling"],
)
def test_trees_give_the_tokens_of_plain_decoding(target, drafter, k, chain):
    exact = RowInvariance(chain=chain, widest=32, tree=True)
    tokens, rounds, _ = run(target, drafter(target), k=k, exact=exact, max_new_tokens=60, top_k=8)
    assert tokens == expected(target, (1, 2, 3), 60)
    assert sum(step.accepted for step in rounds) > 0 or target is hashed
    wanted = expected(target, (1, 2, 3), 60)
    for place in (1, 7, 20):
        tokens, _, _ = run(target, drafter(target), k=k, exact=exact, stop_ids={wanted[place]}, top_k=8)
        assert tokens == expected(target, (1, 2, 3), 40, {wanted[place]})


def test_a_tree_brings_what_its_right_path_does():
    """Two wrong siblings before every right draft: positions move up, and the cache goes on as a chain's would."""

    class Beside:
        def propose(self, context, max_tokens):
            sequence = context.tolist()
            tokens, parents, last = [], [], -1
            for _ in range(max_tokens // 3):
                right = hashed(sequence)
                tokens += [(right + 1) % 100, (right + 2) % 100, right]
                parents += [last] * 3
                last = len(tokens) - 1
                sequence.append(right)
            return Draft(tokens=np.array(tokens, np.int64), parents=np.array(parents, np.int64))

    tokens, rounds, table = run(hashed, Beside(), k=9, exact=TREES, max_new_tokens=41)
    assert tokens == expected(hashed, (1, 2, 3), 41)
    assert [(step.drafted, step.accepted, len(step.tokens)) for step in rounds[1:9]] == [(9, 3, 4)] * 8
    sequence = [1, 2, 3, *tokens]
    assert table.read_rows(0, len(sequence) - 1).reshape(-1).astype(int).tolist() == sequence[:-1]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_end_tokens_cut_inside_an_accepted_block(drafter):
    wanted = expected(hashed, (1, 2, 3), 40)
    for place in (0, 1, 7, 20):
        stop = {wanted[place]}
        tokens, rounds, _ = run(hashed, DRAFTERS[drafter](hashed), stop_ids=stop)
        assert tokens == expected(hashed, (1, 2, 3), 40, stop)
        assert rounds[-1].finish_reason == "stop"


def test_counts_of_a_drafter_that_is_always_right():
    tokens, rounds, table = run(hashed, Oracle(hashed, 99), max_new_tokens=25, k=5)
    assert len(tokens) == 25
    # One from prefill, then four rounds of five drafts and a bonus token.
    assert [(step.drafted, step.accepted, len(step.tokens)) for step in rounds] == [(0, 0, 1)] + [(5, 5, 6)] * 4
    assert len(table.calls) == 5


def test_drafts_never_reach_past_the_limit():
    _, rounds, _ = run(hashed, Oracle(hashed, 99), max_new_tokens=4, k=5)
    assert [(step.drafted, len(step.tokens)) for step in rounds] == [(0, 1), (2, 3)]


def test_accepted_counts_only_what_is_emitted():
    wanted = expected(hashed, (1, 2, 3), 6)
    tokens, rounds, _ = run(hashed, Oracle(hashed, 99), stop_ids={wanted[3]})
    assert tokens == wanted[:4]
    assert rounds[-1].accepted == 3


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_cache_ends_the_sequence(drafter):
    tokens, rounds, table = run(hashed, DRAFTERS[drafter](hashed), prompt=range(50), max_new_tokens=40, max_length=64)
    assert tokens == expected(hashed, range(50), 14)
    assert rounds[-1].finish_reason == "length"
    assert max(length + len(fed) for length, fed in table.calls) <= 64


def test_prompt_is_cut_at_multiples_of_the_chunk():
    tokens, _, table = run(hashed, None, prompt=range(23), max_new_tokens=1, prefill_chunk=8)
    assert [(length, len(fed)) for length, fed in table.calls] == [(0, 8), (8, 8), (16, 7)]
    assert tokens == expected(hashed, range(23), 1)


def test_narrow_passes_are_padded_where_only_wider_ones_are_exact():
    tokens, _, table = run(hashed, None, exact=RowInvariance(chain=3, widest=32), max_new_tokens=10)
    assert tokens == expected(hashed, (1, 2, 3), 10)
    assert {len(fed) for _, fed in table.calls[1:]} == {3}


@pytest.mark.parametrize("chain", [1, 3])
def test_no_pass_reaches_over_a_boundary(chain):
    """The target's answer depends on the side of the boundary that the pass's total lies on, as real kernels' do."""
    boundaries = (12, 20, 21, 30)
    table = TableSession(hashed)
    honest = table.run

    def run_on_a_side(token_ids, cache_length, num_logits_rows, parents):
        side = sum(cache_length + len(token_ids) >= total for total in boundaries)
        return (honest(token_ids, cache_length, num_logits_rows, parents) + side) % 100

    table.run = run_on_a_side
    sequences = []
    for drafter, k in ((None, 0), (Random(3), 9), (Oracle(hashed, 99), 9), (PromptLookup(), 5)):
        rounds = run_loop(
            table,
            [1, 2, 3],
            drafter=drafter,
            num_draft_tokens=k,
            exact=RowInvariance(chain=chain, widest=32, boundaries=boundaries),
        )
        sequences.append([token for step in rounds for token in step.tokens])
    assert sequences[1:] == sequences[:1] * 3


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([100], r"proposed \[100\]; ids below 100 were expected"),
        ([-1], r"proposed \[-1\]; ids below 100 were expected"),
        ([1] * 6, "'Bad' proposed 6 tokens; at most 5 were expected"),
    ],
)
def test_drafts_that_cannot_be_fed_are_an_error(tokens, message):
    drafter = type("Bad", (), {"propose": lambda self, context, n: Draft(tokens=np.array(tokens))})()
    with pytest.raises(GenerationError, match=message):
        run(hashed, drafter)


def test_trees_are_refused():
    draft = Draft(tokens=np.array([1, 2]), parents=np.array([-1, -1]))
    drafter = type("Tree", (), {"propose": lambda self, context, n: draft})()
    with pytest.raises(GenerationError, match="trees are not exact on this engine's kernels"):
        run(hashed, drafter)


@pytest.mark.parametrize("parents", [[-1, 1], [-2, -1], [0, -1], [-1]])
def test_trees_that_cannot_be_fed_are_an_error(parents):
    draft = Draft(tokens=np.array([1, 2]), parents=np.array(parents))
    drafter = type("Tree", (), {"propose": lambda self, context, n: draft})()
    with pytest.raises(GenerationError, match="as many indices of earlier ones"):
        run(hashed, drafter, exact=TREES)


def test_prompts_that_cannot_be_fed():
    contract = TableSession(hashed, max_length=64).contract
    for prompt, kind, message in (
        ([], GenerationError, "the prompt is empty"),
        (range(64), ContextLimitError, "the prompt has 64 tokens and this engine holds 64"),
        ([5, 100], GenerationError, "outside the vocabulary of 100"),
    ):
        with pytest.raises(kind, match=message):
            check_prompt(np.array(prompt, np.int64), contract)
    check_prompt(np.arange(63), contract)


def test_following_a_chain_and_a_tree():
    chain = follow(np.array([4, 5]))
    assert [chain(0, 4), chain(1, 5), chain(1, 4), chain(2, 5)] == [1, 2, None, None]
    assert follow(np.array([], np.int64))(0, 4) is None
    # 4 and 7 follow the pending token; 5 and 6 follow 4; 5 follows 7.
    tree = follow(np.array([4, 7, 5, 6, 5]), np.array([-1, -1, 0, 0, 1]))
    assert [tree(0, 4), tree(0, 7), tree(0, 5), tree(1, 5), tree(1, 6), tree(2, 5), tree(2, 6)] == [
        *(1, 2, None, 3, 4, 5, None)
    ]


def test_kv_cache_counts_and_refuses():
    cache = KVCache(TableSession(hashed, max_length=10).contract)
    cache.commit(np.arange(7))
    cache.truncate(5)
    assert (cache.length, cache.room) == (5, 5)
    assert cache.tokens.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ContextLimitError, match="6 tokens do not fit"):
        cache.commit(np.arange(6))
    with pytest.raises(ContextLimitError, match="holds 5 tokens and cannot be cut to 6"):
        cache.truncate(6)


def test_what_a_round_takes_beside_its_pass_is_of_its_time():
    """As of the drafts that are judged, and what is learned of them."""

    class Slow(NoControl):
        def learn(self, outcome):
            time.sleep(0.02)

    session = TableSession(lambda context: (context[-1] + 1) % 50, vocab_size=50)
    first, *later = run_loop(session, [1, 2, 3], control=Slow(), max_new_tokens=4)
    assert first.seconds < 0.02
    assert all(step.seconds >= 0.02 for step in later)
