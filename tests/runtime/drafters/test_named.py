"""Drafters by name, the rules for what drafters propose, and the messages for what cannot be honoured."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from quasar.errors import GenerationError
from runtime.drafters import Draft, PromptLookup, Recycling, Suffix
from runtime.drafters import named as names
from runtime.drafters.base import ask, name_of
from runtime.drafters.named import ENTRY_POINTS, VerifierProfile, known_names, make_drafters

OWN = ["auto", "none", "prompt-lookup", "suffix", "recycling", "prediction", "eagle", "model", "self", "hierarchical"]


def target(**changes):
    values = {"vocab_size": 100, "trees": False, "tells_successors": True, "warm": {1: [2]}}
    return VerifierProfile(**{**values, **changes})


@pytest.fixture(autouse=True)
def _installed_anew():
    """What other packages bring is looked up once; tests bring their own."""
    names._installed.cache_clear()
    yield
    names._installed.cache_clear()


def refused(asked, **changes):
    with pytest.raises(GenerationError) as error:
        make_drafters(asked, target(**changes))
    return str(error.value)


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ("suffix", [Suffix]),
        ("recycling", [Recycling]),
        ("prompt-lookup", [PromptLookup]),
        ("suffix,recycling", [Suffix, Recycling]),
        (" recycling , suffix ", [Recycling, Suffix]),
        (["suffix", "prompt-lookup:1-2,recycling"], [Suffix, PromptLookup, Recycling]),
        (("suffix",), [Suffix]),
        ("auto", [Suffix, Recycling]),
        ("auto,prompt-lookup", [Suffix, Recycling, PromptLookup]),
        ("auto,suffix", [Suffix, Recycling]),
        ("recycling,auto,recycling", [Recycling, Suffix]),
        ("suffix:,auto,suffix", [Suffix, Recycling]),
        ("prompt-lookup:1-2,prompt-lookup:2-4", [PromptLookup, PromptLookup]),
        ("none", []),
        (["none"], []),
    ],
)
def test_names(asked, kinds):
    assert [type(one) for one in make_drafters(asked, target())] == kinds


def test_auto_is_what_the_engine_can_have():
    assert [type(one) for one in make_drafters("auto", target(tells_successors=False))] == [Suffix]


def test_objects_are_taken_as_they_are():
    own = PromptLookup(max_ngram=2)
    assert make_drafters(own, target()) == [own]
    found = make_drafters([own, "suffix"], target())
    assert found[0] is own
    assert type(found[1]) is Suffix


def test_every_sequence_gets_drafters_of_its_own():
    one, other = (make_drafters("suffix,recycling", target()) for _ in range(2))
    assert not {id(drafter) for drafter in one} & {id(drafter) for drafter in other}


def test_sizes_of_n_grams():
    assert make_drafters("prompt-lookup", target()) == [PromptLookup()]
    assert make_drafters("prompt-lookup:", target()) == [PromptLookup()]
    assert make_drafters("prompt-lookup:2-4", target()) == [PromptLookup(min_ngram=2, max_ngram=4)]
    for argument in ("3", "1-", "-3", "a-b", "1-3x", "1:3"):
        assert refused(f"prompt-lookup:{argument}") == (
            f"drafter 'prompt-lookup:{argument}' came; the shortest and the longest n-gram were expected, as in "
            "prompt-lookup:1-3"
        )
    assert refused("prompt-lookup:3-1") == ("min_ngram is 3, max_ngram 1; 1 <= min_ngram <= max_ngram was expected")


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_trees_where_they_are_exact(name):
    context = np.array([1, 5, 2, 1, 6, 3, 1], np.int64)
    for trees in (False, True):
        (drafter,) = make_drafters(name, target(trees=trees))
        if name == "recycling":
            drafter.observe(np.array([1]), np.array([[4, 5, 6, 7]]))
        draft = ask(drafter, context, 9, trees=trees)
        assert len(draft.tokens) > 0
        assert (draft.parents is not None) == trees


def test_recycling_starts_from_what_comes_with_the_engine():
    (drafter,) = make_drafters("recycling", target(warm={7: [8], 8: [9]}))
    assert drafter.propose(np.array([7]), 5).tokens.tolist() == [8, 9]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "drafter is an empty list; one name or drafter was expected, or 'none'"),
        ("none,suffix", "drafter 'none' stands beside others; it goes alone"),
        (["suffix", "none"], "drafter 'none' stands beside others; it goes alone"),
        ("suffix:3", "drafter 'suffix:3' came; 'suffix' takes nothing after a colon"),
        (
            "recycling:kept",
            "drafter 'recycling:kept' keeps what an engine saw, and there is none here: take 'recycling'",
        ),
        ("recycling:a:b", "drafter 'recycling:a:b' came; 'recycling' or 'recycling:kept' was expected"),
        ("model", "drafter 'model' needs an engine directory after a colon, as in model:DIR"),
        ("hierarchical:", "drafter 'hierarchical' needs an engine directory after a colon, as in hierarchical:DIR"),
        ("self", "drafter 'self' is a second graph of the verifier's, and there is no engine here"),
        (
            "hierarchical:x",
            "drafter 'hierarchical:x' is compared with the verifier, and there is no engine directory of it here",
        ),
        ("magic", f"unknown drafter 'magic'; known are {', '.join(OWN)}"),
        ("sufix", f"unknown drafter 'sufix'; known are {', '.join(OWN)}; did you mean 'suffix'?"),
        ("Suffix:1", f"unknown drafter 'Suffix'; known are {', '.join(OWN)}; did you mean 'suffix'?"),
        ("", f"unknown drafter ''; known are {', '.join(OWN)}"),
        ("suffix,", f"unknown drafter ''; known are {', '.join(OWN)}"),
    ],
)
def test_what_cannot_be_honoured(asked, message):
    assert refused(asked) == message


def test_recycling_needs_an_engine_that_tells_successors():
    assert refused("suffix,recycling", tells_successors=False) == (
        "drafter 'recycling' needs the verifier's likeliest tokens, and this engine's graph does not tell them: "
        "build it again with this version"
    )


class TestEntryPoints:
    """Drafters that installed packages bring."""

    @pytest.fixture
    def install(self, monkeypatch):
        def as_installed(**factories):
            asked = []

            def entry_points(*, group):
                asked.append(group)
                return [
                    SimpleNamespace(name=name, value=f"package:{name}", load=lambda made=made: made)
                    for name, made in factories.items()
                ]

            monkeypatch.setattr(names, "entry_points", entry_points)
            return asked

        return as_installed

    def test_by_name_and_with_an_argument(self, install):
        class Own:
            def __init__(self, argument, target):
                self.argument, self.target = argument, target

            def propose(self, context, max_tokens):
                raise AssertionError

        asked = install(own=Own)
        engine = target()
        plain, other, third = make_drafters("own,suffix,own:some:thing", engine)
        assert (plain.argument, third.argument, third.target) == ("", "some:thing", engine)
        assert type(other) is Suffix
        assert asked == [ENTRY_POINTS]
        assert known_names() == [*OWN, "own"]
        assert refused("owm").endswith(", own; did you mean 'own'?")

    def test_names_of_ours_stay_ours(self, install):
        def never(argument, target):
            raise AssertionError

        install(**dict.fromkeys(OWN, never))
        assert [type(one) for one in make_drafters("suffix", target())] == [Suffix]
        assert [type(one) for one in make_drafters("auto", target(tells_successors=False))] == [Suffix]
        assert make_drafters("none", target()) == []
        assert known_names() == OWN

    def test_a_broken_package_breaks_its_own_drafter_alone(self, monkeypatch):
        def broken():
            raise ImportError("no module named torch")

        entries = [
            SimpleNamespace(name="broken", value="a:make", load=broken),
            SimpleNamespace(name="wrong", value="b:make", load=lambda: lambda argument, target: 3),
            SimpleNamespace(name="fine", value="c:make", load=lambda: lambda argument, target: PromptLookup()),
        ]
        monkeypatch.setattr(names, "entry_points", lambda *, group: entries)
        assert [type(one) for one in make_drafters("fine", target())] == [PromptLookup]
        assert refused("broken") == (
            "drafter 'broken', of the package that registers 'a:make', cannot be made: ImportError: no module named "
            "torch"
        )
        assert refused("wrong") == "drafter 'wrong' is made as int, which has no propose()"

    def test_they_are_looked_up_once(self, install):
        asked = install(own=lambda argument, target: PromptLookup())
        for _ in range(3):
            make_drafters("own", target())
        assert asked == [ENTRY_POINTS]


NO_TREES = (
    "drafter 'Proposes' proposed a tree, and trees are not exact on this engine's kernels (native ones are): let it "
    "propose a chain, without parents"
)
NO_PARENTS = (
    "drafter 'Proposes' proposed parents {}; for 2 tokens, as many indices of earlier ones (or -1) were expected"
)


class Proposes:
    def __init__(self, tokens, parents=None):
        self.draft = Draft(tokens=np.array(tokens, np.int64), parents=None if parents is None else np.array(parents))

    def propose(self, context, max_tokens):
        return self.draft


@pytest.mark.parametrize(
    ("tokens", "parents", "trees", "message"),
    [
        ([1, 2, 3], None, True, "drafter 'Proposes' proposed 3 tokens; at most 2 were expected"),
        ([1, 2], [-1, 0], False, NO_TREES),
        *(
            ([1, 2], parents, True, NO_PARENTS.format(parents))
            for parents in ([-1, 1], [-2, 0], [0, -1], [-1], [-1, 0, 1])
        ),
    ],
)
def test_proposals_that_cannot_be_fed(tokens, parents, trees, message):
    with pytest.raises(GenerationError, match=f"^{re.escape(message)}$"):
        ask(Proposes(tokens, parents), np.array([1]), 2, trees=trees)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Draft(tokens=[1, 2]), "tokens as list; an int64 array [K] was expected"),
        (Draft(tokens=np.array([1.0])), "tokens as float64 [1]; an int64 array [K] was expected"),
        (Draft(tokens=np.zeros((1, 2), int)), "tokens as int64 [1, 2]; an int64 array [K] was expected"),
        (Draft(tokens=np.array([1]), parents=[-1]), "parents as list; an int64 array [K] was expected"),
        (Draft(tokens=np.array([1]), evidence="x"), "evidence as str; an int64 array [K] was expected"),
        (
            Draft(tokens=np.array([1, 2]), evidence=np.array([1])),
            "1 numbers as evidence for 2 tokens; one for each was expected",
        ),
    ],
)
def test_proposals_that_are_no_drafts(draft, message):
    drafter = Proposes([1])
    drafter.draft = draft
    with pytest.raises(GenerationError) as refused:
        ask(drafter, np.array([1]), 2, trees=True)
    assert str(refused.value) == f"drafter 'Proposes' proposed {message}"


def test_proposals_that_can():
    for drafter, trees in ((Proposes([1, 2]), False), (Proposes([1, 2], [-1, -1]), True), (Proposes([]), False)):
        assert ask(drafter, np.array([1]), 2, trees=trees) is drafter.draft


def test_names_of_drafters():
    assert name_of(Suffix()) == "suffix"
    assert name_of(Recycling()) == "recycling"
    assert name_of(PromptLookup()) == "PromptLookup"
    assert name_of(Proposes([])) == "Proposes"
