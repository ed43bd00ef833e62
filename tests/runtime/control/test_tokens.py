"""Whatever a controller drafts, the tokens are those of plain decoding; drafters are told what passes saw."""

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.control import FixedControl
from runtime.drafters import PromptLookup, Recycling, Suffix
from runtime.generation_options import GenerationOptions
from runtime.segment import NO_PROPOSAL
from tests.runtime.control.processes import FLAT, SURFACES, OnSurface, Script, SlowOracle, on_session, sequence_of
from tests.runtime.test_loop import Oracle, Random, Trees, expected, hashed, looping

DRAFTERS = {
    "right": lambda target: [Oracle(target, 99)],
    "wrong": lambda target: [Oracle(target, 0)],
    "right-then-wrong": lambda target: [Oracle(target, 2)],
    "random": lambda target: [Random(4)],
    "auto": lambda target: [Suffix(), Recycling()],
    "several": lambda target: [Random(5), Oracle(target, 1), Suffix(), PromptLookup()],
    "slow": lambda target: [SlowOracle(target, 3), Suffix()],
    "slow-wrong": lambda target: [SlowOracle(target, 0)],
}


class TestTokens:
    """Whatever is drafted, the tokens are those of plain decoding, and as many."""

    @pytest.mark.parametrize("target", [hashed, looping])
    @pytest.mark.parametrize("drafters", DRAFTERS)
    @pytest.mark.parametrize("surface", SURFACES)
    @pytest.mark.parametrize("chain", [1, 3])
    def test_chains(self, target, drafters, surface, chain):
        control = OnSurface(DRAFTERS[drafters](target), SURFACES[surface], plain_width=chain)
        tokens, rounds, table = on_session(control, target, chain=chain, top_k=8)
        assert tokens == expected(target, (1, 2, 3), 40)
        assert rounds[-1].finish_reason == "length"
        assert {len(fed) for _, fed in table.calls[1:]} <= set(range(chain, 33))

    @pytest.mark.parametrize("target", [hashed, looping])
    @pytest.mark.parametrize("surface", SURFACES)
    @pytest.mark.parametrize(
        "drafters",
        [
            lambda target: [Trees(target, 5)],
            lambda target: [Trees(target, 6), Suffix(branches=3), Recycling(branches=4), Oracle(target, 2)],
            lambda target: [SlowOracle(target, 2), Trees(target, 7)],
        ],
        ids=["random", "several", "slow"],
    )
    def test_trees(self, target, surface, drafters):
        control = OnSurface(drafters(target), SURFACES[surface], trees=True)
        tokens, _, _ = on_session(control, target, trees=True, top_k=8)
        assert tokens == expected(target, (1, 2, 3), 40)

    def test_siblings_are_verified_where_trees_are_exact(self):
        """Two chains that part, each of them right at times."""
        sequence = [1, 2, 3, *expected(hashed, (1, 2, 3), 100)]
        chosen = {}
        for trees in (False, True):
            drafters = [Script(np.array(sequence), 0.4, seed, name=f"script {seed}") for seed in (1, 2)]
            control = OnSurface(drafters, FLAT, trees=trees)
            tokens, rounds, _ = on_session(control, hashed, count=60, trees=trees)
            assert tokens == sequence[3:63]
            chosen[trees] = [outcome.segment.proposal.draft.parents is not None for outcome in control.outcomes]
            assert sum(step.accepted for step in rounds) > 10
        assert not any(chosen[False])
        assert np.mean(chosen[True]) > 0.5

    @pytest.mark.parametrize("drafters", ["right", "random", "auto", "slow"])
    def test_drawn_tokens(self, drafters):
        options = GenerationOptions(temperature=0.8, seed=3)

        def logits(context):
            # The next token of a loop is likely, but not certain.
            scores = np.zeros(100, np.float32)
            scores[looping(context)] = 5.0
            return scores

        plain, _, _ = on_session(None, None, options=options, next_logits=logits)
        control = OnSurface(DRAFTERS[drafters](looping), FLAT)
        tokens, rounds, _ = on_session(control, None, options=options, next_logits=logits, top_k=8)
        assert tokens == plain
        assert len(set(tokens)) > 7
        assert sum(step.drafted for step in rounds) > 0


class Observes:
    """Proposes nothing, and keeps what it is told."""

    def __init__(self):
        self.seen = []

    def propose(self, context, max_tokens):
        return NO_PROPOSAL.draft

    def observe(self, tokens, successors):
        self.seen.append((tokens.tolist(), successors[:, 0].tolist()))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("top_k", [0, 8])
def test_drafters_that_observe_are_told_every_token(fixed, top_k):
    drafter = Observes()
    if fixed:
        on_session(FixedControl(drafter, 3), hashed, count=6, top_k=top_k)
    else:
        on_session(OnSurface([drafter], FLAT), hashed, count=6, top_k=top_k)
    sequence = [1, 2, 3, *expected(hashed, (1, 2, 3), 6)]
    # The prompt's last token, then the pending one of every round.
    assert drafter.seen == ([([sequence[place]], [sequence[place + 1]]) for place in range(2, 8)] if top_k else [])


def test_a_slow_drafter_that_observes_is_told_too():
    class Both(SlowOracle, Observes):
        def __init__(self):
            SlowOracle.__init__(self, hashed, 0)
            Observes.__init__(self)

    drafter = Both()
    on_session(OnSurface([drafter], FLAT), hashed, count=6, top_k=8)
    assert [token for tokens, _ in drafter.seen for token in tokens].count(3) >= 1
    assert len(drafter.seen) == 6


class TestFixed:
    def test_as_many_in_every_round(self):
        sequence = sequence_of(100)
        drafter = Script(sequence, 0.0)
        control = FixedControl(drafter, 5)
        assert len(control.propose(sequence[:20], 31, 19).draft.tokens) == 5
        assert len(control.propose(sequence[:20], 2, 19).draft.tokens) == 2
        assert control.propose(sequence[:20], 5, 19).drafter == "script"
        assert drafter.asked == [5, 2, 5]
        for most in (0, -1):
            assert control.propose(sequence[:20], most, 19) is NO_PROPOSAL
        assert FixedControl(Script(sequence, 1.0, most=0), 5).propose(sequence[:20], 9, 19) is NO_PROPOSAL
        assert len(drafter.asked) == 3

    def test_trees_only_where_they_are_exact(self):
        context = np.array([1, 5, 2, 1, 6, 3, 1])
        assert FixedControl(Suffix(branches=2), 9, trees=True).propose(context, 9, 6).draft.parents is not None
        with pytest.raises(GenerationError, match="'suffix' proposed a tree"):
            FixedControl(Suffix(branches=2), 9).propose(context, 9, 6)
