"""Engines with a draft head: tokens are those of plain decoding, greedy and drawn, alone and beside others."""

from dataclasses import replace

import numpy as np
import pytest

import runtime
from engines import OnnxRuntimeOptions
from engines.loading import load_engine
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from export.add_head import add_head
from quasar.errors import GenerationError
from runtime.drafters.draft_head import HeadDrafter
from tests.draft_heads import copy_engine, write_random_head
from tests.plugins.cpu.operators import needs_library

pytestmark = needs_library

PROMPTS = [np.arange(3, 3 + length) * 7 % 250 for length in (2, 9, 40, 120)]


@pytest.fixture(scope="module")
def engine(head_engine):
    with runtime.load(head_engine, threads=1, max_sequences=4) as engine:
        yield engine


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "drafted",
    [
        {"drafter": "eagle"},
        {"drafter": "eagle", "num_draft_tokens": 6},
        {"drafter": "auto"},
        {"drafter": "eagle,suffix"},
    ],
    ids=["adaptive", "fixed", "auto", "with suffix"],
)
def test_tokens_are_those_of_plain_decoding(engine, drawn, drafted):
    used = 0
    for prompt in PROMPTS:
        options = {"max_new_tokens": 40, "ignore_eos": True, **drawn}
        plain = engine.generate(prompt, drafter="none", **options)
        found = engine.generate(prompt, **drafted, **options)
        assert found.token_ids == plain.token_ids
        used += sum(one.drafted for one in found.stats.sources if one.drafter == "eagle")
    if "num_draft_tokens" in drafted:
        assert used > 100


def test_a_tree_grows_wider_than_the_verifier_is_fed(shared_engine, tiny_model, tmp_path, monkeypatch):
    """Nodes of different branches are fed with their paths, of which an engine of narrow passes verifies a few."""
    write_random_head(tmp_path / "head", tiny_model)
    narrow = copy_engine(shared_engine(tiny_model, max_width=4), tmp_path / "engine")
    add_head(narrow, tmp_path / "head")
    widths = []

    def deepest(drafter, reached, most):
        """Four of the first nodes, then one below each of them."""
        left = [node for node in range(len(reached)) if node not in drafter.tree.expanded]
        if not drafter.tree.expanded:
            return left[:4]
        left.sort(key=lambda node: -drafter.tree.depths[node])
        return list({drafter.tree.parents[node]: node for node in reversed(left)}.values())[::-1][:4]

    run = OnnxRuntimeDraftHead.run
    monkeypatch.setattr(HeadDrafter, "frontier", deepest)
    monkeypatch.setattr(
        OnnxRuntimeDraftHead,
        "run",
        lambda head, batch, states: widths.append(len(states)) or run(head, batch, states),
    )
    options = {"max_new_tokens": 12, "ignore_eos": True}
    with runtime.load(narrow, threads=1) as engine:
        plain = engine.generate(PROMPTS[1], drafter="none", **options)
        found = engine.generate(PROMPTS[1], drafter="eagle", num_draft_tokens=3, **options)
    assert found.token_ids == plain.token_ids
    assert max(widths[1:]) > 4


def test_sequences_side_by_side_are_exact(engine):
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain = [engine.generate(prompt, drafter="none", **options).token_ids for prompt in PROMPTS]
    for drafted in ({"drafter": "eagle"}, {"drafter": "eagle", "num_draft_tokens": 4}):
        found = engine.generate(PROMPTS * 2, **drafted, **options)
        assert [one.token_ids for one in found] == plain * 2


def test_trees_of_several_sequences_grow_in_the_same_steps(head_engine):
    options = OnnxRuntimeOptions(threads=1, slots=4)
    loaded = load_engine(head_engine, options=options)
    # Positions that cost nothing: whatever a head says is verified.
    free = {16: {1: 10.0, 32: 10.01}}
    loaded = replace(loaded, record=replace(loaded.record, cost_surface_ms=free))
    batches = []
    run = loaded.draft_head.run

    def counted(batch, states):
        batches.append(len(batch))
        return run(batch, states)

    loaded.draft_head.run = counted
    with runtime.Engine(loaded) as engine:
        options = {"max_new_tokens": 40, "ignore_eos": True}
        plain = [one.token_ids for one in engine.generate(PROMPTS * 2, drafter="none", **options)]
        assert not batches
        found = engine.generate(PROMPTS * 2, drafter="eagle", **options)
        assert [one.token_ids for one in found] == plain
        drafted = sum(count.drafted for one in found for count in one.stats.sources)
    # How often it pays depends on how fast steps are here; they were shared.
    assert drafted > 0
    assert max(batches) > 1


@pytest.fixture
def free_engine(head_engine):
    """Positions that cost nothing: whatever a head says is verified."""
    loaded = load_engine(head_engine, options=OnnxRuntimeOptions(threads=1, slots=4))
    loaded = replace(loaded, record=replace(loaded.record, cost_surface_ms={16: {1: 10.0, 32: 10.01}}))
    with runtime.Engine(loaded) as engine:
        yield engine


def finish(streams):
    """Tokens, or the error, of streams that go on side by side."""
    answers = [[] for _ in streams]
    left = dict(enumerate(streams))
    while left:
        for place, stream in list(left.items()):
            try:
                answers[place] += next(stream).token_ids
            except StopIteration:
                del left[place]
            except Exception as error:
                answers[place] = error
                del left[place]
    return answers


def test_a_head_that_is_named_twice_drafts_once(free_engine):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    plain = [list(one.token_ids) for one in free_engine.generate(PROMPTS, drafter="none", **options)]
    drafters = ("auto,eagle", "eagle,eagle", "eagle", "none")
    streams = [
        free_engine.stream(prompt, drafter=drafter, **options)
        for prompt, drafter in zip(PROMPTS, drafters, strict=True)
    ]
    assert finish(streams) == plain


def test_what_a_head_raises_is_of_those_that_draft_with_it(free_engine, monkeypatch):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    plain = [list(one.token_ids) for one in free_engine.generate(PROMPTS, drafter="none", **options)]

    def fail(head, batch, states):
        raise RuntimeError("the head fails")

    monkeypatch.setattr(OnnxRuntimeDraftHead, "run", fail)
    drafters = ("eagle", "none", "eagle", "suffix")
    streams = [
        free_engine.stream(prompt, drafter=drafter, **options)
        for prompt, drafter in zip(PROMPTS, drafters, strict=True)
    ]
    failed, one, failed_too, other = finish(streams)
    assert [one, other] == [plain[1], plain[3]]
    assert str(failed) == str(failed_too) == "the head fails"


@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("drafted", [{"drafter": "eagle"}, {"drafter": "eagle", "num_draft_tokens": 6}, {}])
def test_answers_under_a_grammar_are_those_of_plain_decoding(engine, drawn, drafted):
    options = {"max_new_tokens": 40, "response_format": {"type": "regex", "regex": "([a-f]{2,5} ){12}"}, **drawn}
    used = 0
    for prompt in PROMPTS:
        plain = engine.generate(prompt, drafter="none", **options)
        found = engine.generate(prompt, **drafted, **options)
        assert found.token_ids == plain.token_ids
        used += sum(one.drafted for one in found.stats.sources if one.drafter == "eagle")
    # What the head says of random weights is seldom permitted; a number of drafts asks it in every round.
    assert used > 0 or "num_draft_tokens" not in drafted


def test_a_conversation_goes_on(engine):
    options = {"max_new_tokens": 12, "ignore_eos": True, "drafter": "eagle", "num_draft_tokens": 4}
    plain = {**options, "drafter": "none", "num_draft_tokens": None}
    answers = []
    for chosen in (options, plain):
        conversation = engine.session()
        answers.append([conversation.generate(text, **chosen).token_ids for text in ("Hello", "And then?", "Why?")])
    assert answers[0] == answers[1]


def test_a_head_needs_native_kernels(head_engine):
    message = "drafter 'eagle' is a draft head, and this engine has none, or none that"
    with runtime.load(head_engine, threads=1, kernels="stock") as engine:
        assert "eagle" not in engine.drafters
        with pytest.raises(GenerationError, match=message):
            engine.generate(PROMPTS[1], drafter="eagle", max_new_tokens=4)


def test_it_can_be_left_out(head_engine):
    loaded = load_engine(head_engine, options=OnnxRuntimeOptions(threads=1, draft_head=False))
    assert loaded.draft_head is None
    assert loaded.session.hidden_states is None
    loaded.session.close()


def test_it_is_not_loaded_where_passes_tell_of_other_layers(head_engine):
    options = OnnxRuntimeOptions(threads=1, hidden_states=(1, 2))
    loaded = load_engine(head_engine, options=options)
    assert loaded.directory.manifest.draft_head.feature_layers != (1, 2)
    assert loaded.draft_head is None
    loaded.session.run(np.arange(3), 0, 1)
    assert len(loaded.session.hidden_states) == 2
    loaded.session.close()


def test_it_is_among_the_engines_drafters(engine):
    assert "eagle" in engine.drafters


def test_its_memory_counts(engine, head_engine):
    head = engine.manifest.draft_head
    weights = (head_engine / head.weights).stat().st_size
    # Its cache besides: keys and values of one layer.
    assert engine.memory().drafters > weights
