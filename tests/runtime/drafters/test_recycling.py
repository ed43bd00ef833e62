"""Token recycling: what is kept of what the verifier saw, and the chains and trees that are made of it."""

import itertools
import math

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.control.control import tell
from runtime.drafters import Draft, Recycling
from runtime.drafters.base import ObservingDrafter, ask
from runtime.drafters.recycling import _PRIORS, KEPT
from runtime.segment import Outcome, Proposal, Segment, seen_tokens
from runtime.testing import TableSession, run_loop

DEEPEST = 3


def array(tokens):
    return np.array(tokens, np.int64)


def saw(drafter, successors):
    """Let it see positions: token → successors."""
    drafter.observe(array(list(successors)), array(list(successors.values())))


def propose(drafter, last, k):
    return drafter.propose(array([99, last]), k)


def paths(draft):
    """The tokens from the pending one down to each of a draft's."""
    parents = range(-1, len(draft.tokens) - 1) if draft.parents is None else draft.parents.tolist()
    found = []
    for token, parent in zip(draft.tokens.tolist(), parents, strict=True):
        found.append((*(() if parent == -1 else found[parent]), token))
    return found


def everything(tokens=40):
    """Every token is known, and leads to four others."""
    return {token: [(5 * token + rank + 1) % tokens for rank in range(KEPT)] for token in range(tokens)}


def test_a_chain_of_what_was_likeliest():
    drafter = Recycling()
    saw(drafter, {1: [2, 8], 2: [3, 8], 3: [4, 8], 4: [5, 8]})
    draft = propose(drafter, 1, 31)
    assert draft.tokens.tolist() == [2, 3, 4]
    assert draft.parents is None
    assert propose(drafter, 1, 2).tokens.tolist() == [2, 3]
    assert propose(drafter, 4, 9).tokens.tolist() == [5]
    assert len(propose(drafter, 7, 9).tokens) == 0
    assert len(propose(drafter, 1, 0).tokens) == 0
    assert len(propose(drafter, 1, -1).tokens) == 0


def test_the_last_sight_counts():
    drafter = Recycling()
    saw(drafter, {1: [2, 3], 2: [5, 6]})
    saw(drafter, {1: [4, 2]})
    assert propose(drafter, 1, 3).tokens.tolist() == [4]
    # Of positions of the same token in one pass, the last.
    drafter.observe(array([1, 1]), array([[2, 0], [3, 0]]))
    assert propose(drafter, 1, 3).tokens.tolist() == [3]


def test_what_was_seen_is_copied():
    """The session overwrites its buffers in the next pass."""
    drafter = Recycling()
    tokens, successors = array([1]), array([[2, 3]])
    drafter.observe(tokens, successors)
    tokens[:], successors[:] = 7, 9
    assert propose(drafter, 1, 1).tokens.tolist() == [2]


@pytest.mark.parametrize("branches", [2, 3, 4])
def test_a_tree_has_the_likeliest_places(branches):
    """Against all paths of ranks, by the product of the ranks' priors."""
    drafter = Recycling(branches=branches)
    saw(drafter, everything())
    ranks = [path for depth in range(1, DEEPEST + 1) for path in itertools.product(range(branches), repeat=depth)]
    likeliest = sorted((math.prod(_PRIORS[rank] for rank in path) for path in ranks), reverse=True)
    for k in range(1, 32):
        draft = ask(drafter, array([99, 1]), k, trees=True)
        found = paths(draft)
        assert len(found) == len(set(found)) == min(k, len(ranks))
        products = []
        for path, evidence in zip(found, draft.evidence.tolist(), strict=True):
            rank_of = [everything()[above].index(token) for above, token in itertools.pairwise((1, *path))]
            products.append(math.prod(_PRIORS[rank] for rank in rank_of))
            # What it rests on: depth, seen in this sequence, rank.
            assert divmod(evidence, KEPT) == (2 * (len(path) - 1), rank_of[-1])
        np.testing.assert_allclose(products, likeliest[: len(found)])


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_no_more_than_asked_for_whatever_is_known(branches):
    random = np.random.default_rng(branches)
    for _ in range(60):
        known = {int(token): random.permutation(12)[:4].tolist() for token in random.permutation(12)[:6]}
        warm = {int(token): random.permutation(12)[: random.integers(0, 5)].tolist() for token in range(12)}
        drafter = Recycling(branches=branches, warm=warm)
        saw(drafter, known)
        k = int(random.integers(1, 32))
        draft = ask(drafter, array([3]), k, trees=branches > 1)
        assert len(draft.tokens) <= k
        found = paths(draft)
        # Siblings are different tokens, and each follows what is known of the one above.
        assert len(set(found)) == len(found)
        for path, evidence in zip(found, [] if draft.evidence is None else draft.evidence.tolist(), strict=True):
            above = ((3, *path))[-2]
            place, rank = divmod(evidence, KEPT)
            depth, is_warm = divmod(place, 2)
            assert depth == len(path) - 1 < DEEPEST
            assert rank < branches
            assert is_warm == (above not in known)
            assert (known if above in known else warm)[above][rank] == path[-1]
            assert 0 < drafter.prior(evidence) <= 1


def test_nothing_hangs_below_what_is_unknown():
    drafter = Recycling(branches=2)
    saw(drafter, {1: [2, 3], 3: [4, 5]})
    assert set(paths(propose(drafter, 1, 31))) == {(2,), (3,), (3, 4), (3, 5)}


def test_four_successors_are_kept():
    drafter = Recycling(branches=4)
    saw(drafter, {1: [10, 11, 12, 13, 14, 15, 16, 17]})
    assert sorted(propose(drafter, 1, 31).tokens.tolist()) == [10, 11, 12, 13]
    # An engine with a small vocabulary tells fewer.
    drafter = Recycling(branches=4)
    saw(drafter, {1: [10, 11]})
    assert sorted(propose(drafter, 1, 31).tokens.tolist()) == [10, 11]


def test_warm_successors_serve_until_a_token_is_seen():
    warm = {1: [2, 3], 2: (5, 6), 4: []}
    drafter = Recycling(warm=warm)
    draft = propose(drafter, 1, 3)
    assert draft.tokens.tolist() == [2, 5]
    assert draft.evidence.tolist() == [4, 12]
    saw(drafter, {2: [7, 8]})
    draft = propose(drafter, 1, 3)
    assert draft.tokens.tolist() == [2, 7]
    assert draft.evidence.tolist() == [4, 8]
    assert len(propose(drafter, 4, 3).tokens) == 0
    assert warm == {1: [2, 3], 2: (5, 6), 4: []}


def test_priors():
    drafter = Recycling()
    for depth in range(DEEPEST):
        own = [drafter.prior(2 * depth * KEPT + rank) for rank in range(KEPT)]
        others = [drafter.prior((2 * depth + 1) * KEPT + rank) for rank in range(KEPT)]
        assert own == sorted(own, reverse=True)
        assert all(0 < warm < seen < 1 for warm, seen in zip(others, own, strict=True))


def outcome(fed, path, successors):
    segment = Segment(
        tokens=array(fed),
        cache_length=5,
        num_logits=len(fed),
        proposal=Proposal(draft=Draft(tokens=array(fed[1:]))),
    )
    seen, told = seen_tokens(segment, None if successors is None else array(successors), path)
    return Outcome(segment=segment, tokens=array([0] * len(path)), path=path, seen=seen, successors=told)


def test_of_one_pass_what_was_accepted_counts():
    """Token 2 is fed twice: accepted after the pending token, and rejected after a sibling."""
    drafter = Recycling()
    assert isinstance(drafter, ObservingDrafter)
    tell([drafter], outcome([1, 2, 3, 2], (0, 1), [[2, 0], [5, 0], [7, 0], [6, 0]]))
    assert propose(drafter, 2, 1).tokens.tolist() == [5]
    # Rejected drafts are not wasted.
    assert propose(drafter, 3, 1).tokens.tolist() == [7]
    assert propose(drafter, 1, 1).tokens.tolist() == [2]


def test_tokens_are_told_in_the_order_of_the_path():
    seen = []
    drafter = type(
        "Sees", (), {"observe": lambda self, tokens, after: seen.append((tokens.tolist(), after.tolist()))}
    )()
    tell([drafter], outcome([1, 2, 3, 4, 5], (0, 3, 4), [[10], [20], [30], [40], [50]]))
    assert seen == [([2, 3, 1, 4, 5], [[20], [30], [10], [40], [50]])]
    tell([drafter], outcome([1, 2], (0,), None))
    tell([], outcome([1, 2], (0,), [[1], [2]]))
    assert len(seen) == 1


@pytest.mark.parametrize("top_k", [8, 0])
def test_a_loop_is_recycled_where_the_engine_tells_successors(top_k):
    table = TableSession(lambda context: (context[-1] + 1) % 7, top_k=top_k)
    rounds = run_loop(table, [0], drafter=Recycling(), num_draft_tokens=9, max_new_tokens=61)
    assert [token for step in rounds for token in step.tokens] == [(1 + place) % 7 for place in range(61)]
    # Seven tokens are seen; from then on three drafts are right in every round.
    drafted = [step.drafted for step in rounds if step.drafted]
    assert len(rounds) < 25 if top_k else drafted == []


@pytest.mark.parametrize("branches", [0, 5])
def test_branches_that_there_are_not(branches):
    with pytest.raises(GenerationError, match=f"branches is {branches}; 1 to 4 was expected"):
        Recycling(branches=branches)
