"""Drafts of a head: what it is fed, in which rows, and that the tokens stay those of plain decoding."""

import numpy as np
import pytest

from engines.contract import Contract
from engines.draft_head import WIDEST_STEP, HeadTargets
from engines.probes.row_invariance import RowInvariance
from engines.session import SessionMemory
from runtime.control.controller import Controller, Knowledge
from runtime.control.latency import LatencyModel
from runtime.drafters.draft_head import DraftHeadCache, HeadDrafter
from runtime.drafters.head_tree import MOST_EXPANDED, HeadTree, evidence_of, probability_of
from runtime.kv_cache import KVCache
from runtime.testing import TableSession, run_loop

TREES = RowInvariance(chain=1, widest=32, boundaries=(), tree=True, prefill=True, batch=True)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
VOCABULARY = 100


def next_token(context):
    """The target's choice goes by the last two tokens."""
    return (7 * context[-1] + 3 * context[-2] + 1) % VOCABULARY


class TableHead:
    """A head that keeps the tokens of its cache, and checks that what it is fed is what it should be.

    It knows the target: of `k` tokens the right one is the likeliest, or after every `wrong`-th context the second.
    What it hands on is (token, position) as the target's hidden states are in `TableSession`, negative where they are
    its own.
    """

    k = 3

    def __init__(self, slots=1, wrong=0):
        self.contract = Contract(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            vocab_size=VOCABULARY,
            max_length=512,
            capacity=576,
            prefill_chunk=16,
            tree_mask=True,
        )
        self.num_slots = self.max_sequences = slots
        self.max_positions = 64
        self._tokens = np.full((slots, 576), -1, np.int64)
        self._own = np.zeros((slots, 576), np.bool_)
        self._wrong = wrong
        self.widths, self.batches, self.copied = [], [], []

    def fuse(self, features):
        [states] = features
        return states

    def run(self, batch, states):
        assert sum(len(one.tokens) for one in batch) <= self.max_positions
        self.batches.append([len(one.tokens) for one in batch])
        told, first = [], 0
        for one in batch:
            end = first + len(one.tokens)
            told.append(self._run_one(one, states[first:end]))
            first = end
        return HeadTargets(
            tokens=np.concatenate([one.tokens for one in told]),
            log_probabilities=np.concatenate([one.log_probabilities for one in told]),
            hidden_states=np.concatenate([one.hidden_states for one in told]),
        )

    def _run_one(self, one, states):
        self.widths.append(len(one.tokens))
        tokens, first = self._tokens[one.slot], one.cache_length
        tokens[first : first + len(one.tokens)] = one.tokens
        paths = []
        for place, token in enumerate(one.tokens):
            parent = place - 1 if one.parents is None else int(one.parents[place])
            above = paths[parent] if parent >= 0 else tokens[:first].tolist()
            paths.append([*above, int(token)])
            # The token before it, and its position: the target's, or the head's own of the one that it follows.
            assert abs(states[place, 0]) == (above[-1] if above else PROMPT[0])
        told = [self._likely(path) for path in paths[len(paths) - one.num_logits :]]
        last = [path[-1] for path in paths[len(paths) - one.num_logits :]]
        return HeadTargets(
            tokens=np.array(told, np.int64),
            log_probabilities=np.log(np.tile(np.array([0.7, 0.2, 0.05], np.float32), (len(told), 1))),
            hidden_states=np.array([[-token, 0] for token in last], np.float32),
        )

    def _likely(self, path):
        before = path[-2] if len(path) > 1 else PROMPT[0]
        right = next_token([before, path[-1]])
        others = [(right + 1) % VOCABULARY, (right + 2) % VOCABULARY]
        wrong = self._wrong and sum(path) % self._wrong == 0
        return [others[0], right, others[1]] if wrong else [right, *others]

    def copy_rows(self, source, target, first, end):
        self.copied.append((first, end))
        self._tokens[target, first:end] = self._tokens[source, first:end]

    def memory(self):
        return SessionMemory(weights=0, cache=0, buffers=0)

    def close(self):
        pass


def plain():
    return tokens_of(run_loop(TableSession(next_token, vocab_size=VOCABULARY), PROMPT, max_new_tokens=60))


def tokens_of(rounds):
    return [token for one in rounds for token in one.tokens]


def told_session():
    return TableSession(next_token, vocab_size=VOCABULARY, prefill_chunk=4, hidden_states=True)


@pytest.mark.parametrize("wrong", [0, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("trees", [True, False])
def test_fixed_drafts_are_those_of_the_context(wrong, count, trees):
    head = DraftHeadCache(TableHead(wrong=wrong))
    exact = TREES if trees else RowInvariance(chain=1, widest=32)
    rounds = run_loop(
        told_session(),
        PROMPT,
        drafter=HeadDrafter(head, trees=trees),
        num_draft_tokens=count,
        max_new_tokens=60,
        exact=exact,
    )
    assert tokens_of(rounds) == plain()
    accepted, drafted = (sum(getattr(one, name) for one in rounds) for name in ("accepted", "drafted"))
    if not wrong and not trees:
        assert accepted == drafted > 0
    if trees and count > 1:
        # A tree holds the right token beside the likeliest one.
        assert accepted >= len(rounds) - 1
    assert accepted > 0


def controller(head, *, pass_ms=10.0, each_ms=0.2, **clock):
    surface = {16: {1: pass_ms, 2: pass_ms + each_ms, 32: pass_ms + 31 * each_ms}}
    knowledge = Knowledge(LatencyModel(surface, widest=32), **clock)
    return Controller([HeadDrafter(head)], knowledge, most=31, trees=True)


class Clock:
    """Every look takes so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_controller_grows_the_tree_while_a_step_pays(wrong):
    head = DraftHeadCache(TableHead(wrong=wrong), clock=Clock(0.0005))
    rounds = run_loop(told_session(), PROMPT, control=controller(head), max_new_tokens=60, exact=TREES)
    assert tokens_of(rounds) == plain()
    # At a twentieth of a pass, steps go deep.
    assert len(rounds) < 60 / 3


def test_where_a_step_takes_as_long_as_a_pass_the_head_is_left_alone():
    session = TableHead(wrong=2)
    head = DraftHeadCache(session, clock=Clock(0.02))
    rounds = run_loop(told_session(), PROMPT, control=controller(head), max_new_tokens=60, exact=TREES)
    assert tokens_of(rounds) == plain()
    # It is tried, and after that now and then.
    assert 0 < len([one for one in rounds if one.drafted]) < 12


class TimedHead(TableHead):
    """Its first pass takes long, and wide ones do: half a millisecond a position."""

    now = 0.0

    def run(self, batch, states):
        self.now += 0.0005 * len(states) if self.widths else 0.05
        return super().run(batch, states)


def test_what_a_head_makes_up_for_is_not_held_against_it():
    session = TimedHead(wrong=2)
    head = DraftHeadCache(session, clock=lambda: session.now)
    control = controller(head, clock=lambda: session.now)
    rounds = run_loop(told_session(), 4 * PROMPT, control=control, max_new_tokens=60, exact=TREES)
    # The prompt took as long as seven passes. From then on a step takes a twentieth of one, and pays in every round.
    assert all(one.drafted for one in rounds[1:-1])


def test_positions_are_fed_once_and_a_prompt_in_chunks():
    session = TableHead()
    prompt = np.arange(40) % 7
    head = DraftHeadCache(session)
    rounds = run_loop(
        TableSession(next_token, vocab_size=VOCABULARY, prefill_chunk=16, hidden_states=True),
        [PROMPT[0], *prompt.tolist()],
        drafter=HeadDrafter(head, trees=False),
        num_draft_tokens=1,
        max_new_tokens=10,
        exact=RowInvariance(chain=1, widest=32),
    )
    assert session.widths[:3] == [16, 16, 9]
    # Each round feeds what the one before committed: the pending token and an accepted draft.
    assert sum(session.widths) <= 41 + sum(len(one.tokens) for one in rounds)


def test_another_sequence_in_the_slot_begins_anew_and_the_same_one_goes_on():
    session = TableHead()
    head = DraftHeadCache(session)
    first = told_session()
    cache = KVCache(first.contract)
    options = {"num_draft_tokens": 2, "max_new_tokens": 12, "exact": RowInvariance(chain=1, widest=32)}
    one = tokens_of(run_loop(first, PROMPT, drafter=HeadDrafter(head, trees=False), cache=cache, **options))
    fed = sum(session.widths)
    # The conversation goes on: the cache has its positions, and the head's slot as well.
    again = [*PROMPT, *one, 8]
    cache.truncate(len(PROMPT) + len(one) - 1)
    two = run_loop(first, again, drafter=HeadDrafter(head, trees=False), cache=cache, **options)
    assert sum(one.accepted for one in two) > 4
    assert sum(session.widths) - fed < 3 * len(tokens_of(two))


def test_a_step_of_many_sequences_takes_as_many_passes_as_it_needs():
    session = TableHead(slots=3)
    session.max_positions = 16
    head = DraftHeadCache(session)
    prompts = [[PROMPT[0], *PROMPT[1:length]] for length in (7, 8, 6)]
    drafters, feeds = [], []
    for slot, prompt in enumerate(prompts):
        drafter = HeadDrafter(head, slot=lambda slot=slot: slot)
        context = np.array([*prompt, 9], np.int64)
        states = np.stack([prompt, range(len(prompt))], axis=1).astype(np.float32)
        drafter.see(context, 0, [states])
        drafters.append(drafter)
        feeds.append(drafter.begin(context))
    head.step(drafters, feeds)
    assert session.batches == [[7, 8], [6]]
    assert [drafter.tree.tokens[0] for drafter in drafters] == [next_token([prompt[-1], 9]) for prompt in prompts]


def fed(head, slot, context, first=0):
    """A drafter in a slot that has seen the context from `first` on, and whose tree has begun."""
    drafter = HeadDrafter(head, slot=lambda: slot)
    states = np.stack([context[first:-1], range(first, len(context) - 1)], axis=1).astype(np.float32)
    drafter.see(context, first, [states])
    feed = drafter.begin(context)
    head.step([drafter], [feed])
    return drafter, len(feed.states)


def test_what_a_prompt_has_of_another_slot_is_copied():
    session = TableHead(slots=3)
    head = DraftHeadCache(session)
    context = np.array([*PROMPT, 9, 7, 5, 3, 1], np.int64)
    other = np.array([*context[:10], 11, 12, 13], np.int64)
    fed(head, 0, context)
    head.copy(0, 1, other)
    # Of ten common tokens nine positions: each is fed with the token after it.
    assert session.copied == [(0, 9)]
    # The verifier's positions up to the eighth were copied as well, so that it shows its states from there on.
    drafter, _ = fed(head, 1, other, first=8)
    assert drafter.tree.tokens[0] == next_token(other.tolist())
    assert (head.slots[1].begin, head.slots[1].end) == (0, 12)
    # What a slot has itself is not copied again.
    head.copy(0, 1, other)
    head.copy(2, 1, other)
    assert session.copied == [(0, 9)]
    head.forget(1)
    assert head.slots[1].end == 0


def test_near_the_end_of_its_cache_the_head_drafts_no_more():
    drafter = HeadDrafter(DraftHeadCache(TableHead()))
    capacity = TableHead().contract.capacity
    for length, drafts in ((capacity - 60, True), (capacity - 40, False)):
        context = np.full(length, PROMPT[0], np.int64)
        drafter.see(context, length - 2, [np.full((1, 2), PROMPT[0], np.float32)])
        assert (drafter.begin(context) is not None) == drafts


def test_feeds_share_what_the_cache_has_of_a_path():
    tree = HeadTree()
    state = np.zeros(2, np.float32)
    likely = np.array([0.6, 0.3], np.float32)
    tree.add(-1, np.array([10, 11]), likely, state)
    first = tree.feed([0])
    assert (first.nodes, first.first, first.parents.tolist(), first.expanded) == ((0,), 0, [-1], 1)
    tree.add(0, np.array([20, 21]), likely, state)
    # A child of what is in the cache is fed alone.
    second = tree.feed([2])
    assert (second.nodes, second.first, second.parents.tolist()) == ((2,), 1, [-1])
    tree.add(2, np.array([30, 31]), likely, state)
    # Two in one step: siblings after the first node.
    both = tree.feed([3, 4])
    assert (both.nodes, both.first, both.parents.tolist(), both.expanded) == ((2, 3, 4), 1, [-1, -1, 0], 2)
    tree.add(3, np.array([40, 41]), likely, state)
    tree.add(4, np.array([50, 51]), likely, state)
    # Another branch: everything from the pending token on.
    other = tree.feed([1])
    assert (other.nodes, other.first, other.parents.tolist()) == ((1,), 0, [-1])
    # Back to the first branch: its positions were overwritten.
    back = tree.feed([7])
    assert back.first == 0
    assert back.nodes == (0, 3, 7)
    assert back.parents.tolist() == [-1, 0, 1]


def test_nodes_whose_paths_fill_a_step_are_not_expanded():
    drafter = HeadDrafter(DraftHeadCache(TableHead()))
    state, likely = np.zeros(2, np.float32), np.array([0.6, 0.3], np.float32)
    node, steps = -1, 0
    while True:
        drafter.tree.add(node, np.array([10, 11]), likely, state)
        # The first child of the newest node alone goes on.
        reached = [0.9 if depth == steps else 0.0 for depth in drafter.tree.depths]
        expanded = [node for node in drafter.frontier(reached, 1) if reached[node]]
        if not expanded:
            break
        (node,), steps = expanded, steps + 1
        assert len(drafter.tree.feed([node]).nodes) == 1
    assert MOST_EXPANDED * steps == WIDEST_STEP


# What a head says after a path: tokens with their probabilities. Everything else is followed by unlikely tokens.
SAID = {
    (): {1: 0.6, 2: 0.31, 3: 0.09},
    (1,): {4: 0.7, 5: 0.2, 6: 0.05},
    (2,): {7: 0.9, 8: 0.05, 9: 0.02},
    (1, 4): {10: 0.8, 11: 0.1, 12: 0.05},
    (2, 7): {13: 0.5, 14: 0.2, 15: 0.1},
}
UNLIKELY = {90: 0.1, 91: 0.05, 92: 0.01}


@pytest.mark.parametrize(
    ("most", "tokens", "parents"),
    [
        # 0.6 and 0.42, the product along the path, before 0.31.
        (2, [1, 4], [-1, 0]),
        # 0.6, 0.42 and 0.336: a chain.
        (3, [1, 4, 10], [-1, 0, 1]),
        # Then 0.31 and 0.279, in the order in which they were found.
        (5, [1, 2, 4, 7, 10], [-1, -1, 0, 1, 2]),
        # 0.1395 before 0.12.
        (6, [1, 2, 4, 7, 10, 13], [-1, -1, 0, 1, 2, 3]),
        (7, [1, 2, 4, 5, 7, 10, 13], [-1, -1, 0, 0, 1, 2, 4]),
    ],
)
def test_the_likeliest_nodes_by_the_product_of_a_path(monkeypatch, most, tokens, parents):
    """EAGLE-2's tree on paper: nodes are expanded and chosen by cumulative probability (2406.16858, section 4)."""
    cache = DraftHeadCache(TableHead())
    drafter, expanded = HeadDrafter(cache), []

    def step(_, feeds):
        paths = [tuple(drafter.tree.path(node)) for node in drafter._expanding]
        assert feeds[0].positions.num_logits == len(paths)
        expanded.append(paths)
        said = [SAID.get(path, UNLIKELY) for path in paths]
        drafter.take(
            HeadTargets(
                tokens=np.array([list(one) for one in said]),
                log_probabilities=np.log(np.array([list(one.values()) for one in said], np.float32)),
                hidden_states=np.zeros((len(said), 2), np.float32),
            )
        )

    monkeypatch.setattr(cache, "step", step)
    context = np.array([*PROMPT, 9], np.int64)
    drafter.see(context, 0, [np.stack([PROMPT, range(len(PROMPT))], axis=1).astype(np.float32)])
    draft = drafter.propose(context, most)
    assert (draft.tokens.tolist(), draft.parents.tolist()) == (tokens, parents)
    # As many steps as drafts; nodes half as likely as the likeliest that is left go with it.
    whole = [[()], [(1,), (2,)], [(1, 4), (2, 7)], [(1, 4, 10)], [(2, 7, 13), (1, 5), (3,)]]
    assert expanded[:5] == whole[:most]
    assert len(expanded) == most


class EvenTokens:
    """A grammar of even tokens, or of one that must come."""

    def __init__(self, forced=()):
        self.asked, self._forced = [], list(forced)

    def forced(self):
        return self._forced

    def permits(self, path, tokens):
        self.asked.append(list(path))
        return [token % 2 == 0 for token in tokens]


def begun(guide, shares=(0.5, 0.3, 0.1), tokens=(11, 12, 14)):
    """A drafter under a grammar whose head has said so of the pending token."""
    drafter = HeadDrafter(DraftHeadCache(TableHead()))
    drafter.follow(guide)
    context = np.array([*PROMPT, 9], np.int64)
    drafter.see(context, 0, [np.stack([PROMPT, range(len(PROMPT))], axis=1).astype(np.float32)])
    if drafter.begin(context) is None:
        return None
    drafter.take(
        HeadTargets(
            tokens=np.array([tokens]),
            log_probabilities=np.log(np.array([shares], np.float32)),
            hidden_states=np.zeros((1, 2), np.float32),
        )
    )
    return drafter


def test_under_a_grammar_the_tree_has_what_may_come():
    guide = EvenTokens()
    drafter = begun(guide)
    assert drafter.tree.tokens == [12, 14]
    # What the forbidden token had is shared out among all that are left.
    np.testing.assert_allclose(drafter.tree.shares, [0.6, 0.2], rtol=1e-6)
    drafter.expand([1])
    drafter.take(
        HeadTargets(
            tokens=np.array([[13, 16]]),
            log_probabilities=np.log(np.array([[0.9, 0.1]], np.float32)),
            hidden_states=np.zeros((1, 2), np.float32),
        )
    )
    assert guide.asked == [[], [14]]
    assert (drafter.tree.tokens, drafter.tree.parents) == ([12, 14, 16], [-1, -1, 1])
    np.testing.assert_allclose(drafter.tree.shares[2], 1.0, rtol=1e-6)


class AnyToken(EvenTokens):
    """Lets everything through."""

    def permits(self, path, tokens):
        return [True] * len(tokens)


def test_numbers_that_are_none_are_no_draft():
    drafter = begun(AnyToken(), shares=(np.nan, np.nan, np.nan))
    assert drafter.tree.tokens == []


def test_where_nothing_likely_may_come_the_tree_stays_empty():
    drafter = begun(EvenTokens(), shares=(0.9, 0.1), tokens=(11, 13))
    assert drafter.tree.tokens == []
    assert not len(drafter.draft().tokens)


def test_a_token_that_must_come_is_not_asked_of_the_head():
    assert begun(EvenTokens(forced=[7])) is None


def test_tokens_that_must_come_are_drafted_by_a_number_of_drafts():
    head = HeadDrafter(DraftHeadCache(TableHead()))
    head.follow(EvenTokens(forced=[7, 8, 9]))
    context = np.array([*PROMPT, 9], np.int64)
    for most in (2, 5):
        draft = head.propose(context, most)
        assert (draft.tokens.tolist(), draft.parents) == ([7, 8, 9][:most], None)


def test_a_round_without_a_tree_makes_up_for_nothing():
    drafter = HeadDrafter(DraftHeadCache(TableHead()))
    context = np.array([*PROMPT, *PROMPT, 9], np.int64)
    states = np.stack([context[:-1], range(len(context) - 1)], axis=1).astype(np.float32)
    drafter.see(context, 0, [states])
    assert drafter.begin(context) is not None
    assert drafter.caught_up
    drafter.follow(EvenTokens(forced=[7]))
    assert drafter.begin(context) is None
    assert not drafter.caught_up


def test_evidence_stands_for_the_probability_that_the_head_gave():
    for share in (0.001, 0.05, 0.33, 0.75, 0.99):
        assert abs(probability_of(evidence_of(share)) - share) < 0.06
