"""From options to what decides about drafts: which control they make, and what is refused."""

import re

import numpy as np
import pytest

from engines.probes.row_invariance import RowInvariance
from quasar.errors import GenerationError
from runtime.control import Controller, FixedControl
from runtime.control.control import NoControl
from runtime.control.controller import Knowledge
from runtime.control.from_options import make_control
from runtime.control.latency import LatencyModel
from runtime.drafters import Draft, Suffix
from runtime.drafters.named import VerifierProfile
from runtime.segment import NO_PROPOSAL

EXACT = RowInvariance(chain=1, widest=32)
NEVER = RowInvariance(chain=None, widest=1)
FREE, STEEP = {256: {1: 10.0}}, {256: {1: 10.0, 2: 20.0}}
LOOP = np.array([1, 2, 3, 4] * 6, np.int64)


def make(asked, number=None, *, exact=EXACT, draw=None, tells_successors=True, surface=FREE):
    return make_control(
        asked,
        number,
        target=VerifierProfile(vocab_size=100, trees=exact.tree, tells_successors=tells_successors, warm={}),
        exact=exact,
        knowledge=Knowledge(LatencyModel(surface, widest=32)),
        draw=draw,
    )


def drafted(control, most=31):
    return len(control.propose(LOOP, most, len(LOOP) - 1).draft.tokens)


@pytest.mark.parametrize(
    ("asked", "number", "kind"),
    [
        ("none", None, NoControl),
        ("none", 5, NoControl),
        ("auto", None, Controller),
        ("suffix", None, Controller),
        (Suffix(), None, Controller),
        ("suffix", 5, FixedControl),
        ([Suffix()], 5, FixedControl),
        ("auto", 5, Controller),
        ("suffix,prompt-lookup", 5, Controller),
    ],
)
def test_kinds(asked, number, kind):
    assert type(make(asked, number)) is kind


def test_auto_of_one_drafter_with_a_number_drafts_so_many():
    assert type(make("auto", 5, tells_successors=False)) is FixedControl


def test_numbers_bound_what_is_drafted():
    assert drafted(make("suffix", 5)) == 5
    assert drafted(make("suffix,prompt-lookup", 5)) == 5
    assert drafted(make("suffix,prompt-lookup", 0)) == 0
    assert drafted(make("suffix", 31)) == 31
    # Without one, what the machine verifies exactly; at first, drafters are asked for a few.
    assert drafted(make("suffix")) == 8
    assert drafted(make("suffix", exact=RowInvariance(chain=1, widest=4))) == 3


def test_trees_where_they_are_exact():
    for tree in (False, True):
        draft = (
            make("suffix", 9, exact=RowInvariance(chain=1, widest=32, tree=tree))
            .propose(np.array([1, 5, 2, 1, 6, 3, 1]), 9, 6)
            .draft
        )
        assert (draft.parents is not None) == tree


def test_the_narrowest_pass_is_that_of_plain_decoding():
    plan = make("suffix", exact=RowInvariance(chain=3, widest=32), surface=STEEP).propose(LOOP, 9, 23)
    # Two drafts take no time, and a third one too much.
    assert len(plan.draft.tokens) == 2
    assert plan.expected_seconds == pytest.approx(0.03)


def test_where_no_two_widths_agree_nothing_is_drafted():
    assert type(make("auto", exact=NEVER)) is NoControl
    assert type(make("auto", 5, exact=NEVER)) is NoControl
    assert type(make("none", exact=NEVER)) is NoControl
    for asked in ("suffix", Suffix(), "auto,suffix"):
        with pytest.raises(GenerationError) as error:
            make(asked, exact=NEVER)
        assert str(error.value) == (
            "on this machine a position's bits depend on how many are fed, so speculation would not be exact: use "
            "drafter='none', or 'auto', which then drafts nothing"
        )


@pytest.mark.parametrize(("number", "widest"), [(32, 32), (8, 8), (100, 8)])
@pytest.mark.parametrize("asked", ["suffix", "auto"])
def test_numbers_that_are_not_verified_exactly(asked, number, widest):
    message = f"num_draft_tokens is {number}; on this machine 0 to {widest - 1} drafts are verified exactly"
    with pytest.raises(GenerationError, match=f"^{re.escape(message)}$"):
        make(asked, number, exact=RowInvariance(chain=1, widest=widest))


def test_drafters_that_sample_share_the_draw():
    class Samples:
        def propose(self, context, max_tokens):
            return Draft(tokens=np.empty(0, np.int64))

        def sample_with(self, draw):
            self.draw = draw

    def draw(logits, position):
        raise AssertionError

    drafter = Samples()
    make([drafter, "suffix"], draw=draw)
    assert drafter.draw is draw
    greedy = Samples()
    make(greedy)
    assert not hasattr(greedy, "draw")


def test_plain_decoding_plans_nothing():
    control = make("none")
    control.begin(LOOP, 1, None)
    assert control.propose(LOOP, 9, 23) is NO_PROPOSAL
