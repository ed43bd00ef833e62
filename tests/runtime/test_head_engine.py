"""Engines with a draft head: tokens are those of plain decoding, greedy and drawn, alone and beside others."""

import numpy as np
import pytest

import runtime
from engines import OnnxRuntimeOptions
from engines.loading import load_engine
from export.add_head import add_head
from quasar.errors import GenerationError
from tests.draft_heads import copy_engine, write_random_head
from tests.plugins.cpu.operators import needs_library

pytestmark = needs_library

PROMPTS = [np.arange(3, 3 + length) * 7 % 250 for length in (2, 9, 40, 120)]


@pytest.fixture(scope="module")
def directory(shared_engine, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    write_random_head(folder / "head", tiny_model)
    directory = copy_engine(shared_engine(tiny_model), folder / "engine")
    add_head(directory, folder / "head")
    return directory


@pytest.fixture(scope="module")
def engine(directory):
    with runtime.load(directory, threads=1, max_sequences=4) as engine:
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


def test_sequences_side_by_side_are_exact(engine):
    options = {"max_new_tokens": 40, "ignore_eos": True}
    plain = [engine.generate(prompt, drafter="none", **options).token_ids for prompt in PROMPTS]
    for drafted in ({"drafter": "eagle"}, {"drafter": "eagle", "num_draft_tokens": 4}):
        found = engine.generate(PROMPTS * 2, **drafted, **options)
        assert [one.token_ids for one in found] == plain * 2


def test_a_conversation_goes_on(engine):
    options = {"max_new_tokens": 12, "ignore_eos": True, "drafter": "eagle", "num_draft_tokens": 4}
    plain = {**options, "drafter": "none", "num_draft_tokens": None}
    answers = []
    for chosen in (options, plain):
        conversation = engine.session()
        answers.append([conversation.generate(text, **chosen).token_ids for text in ("Hello", "And then?", "Why?")])
    assert answers[0] == answers[1]


def test_a_head_needs_native_kernels(directory):
    with (
        runtime.load(directory, threads=1, kernels="stock") as engine,
        pytest.raises(GenerationError, match="drafter 'eagle' is a draft head, and this engine has none, or none that"),
    ):
        engine.generate(PROMPTS[1], drafter="eagle", max_new_tokens=4)


def test_it_can_be_left_out(directory):
    loaded = load_engine(directory, options=OnnxRuntimeOptions(threads=1, draft_head=False))
    assert loaded.draft_head is None
    assert loaded.session.hidden_states is None
    loaded.session.close()


def test_its_memory_counts(engine, directory):
    head = engine.manifest.draft_head
    weights = (directory / head.weights).stat().st_size
    # Its cache besides: keys and values of one layer.
    assert engine.memory().drafters > weights
