"""`verify` finds a divergence where there is one, and says what it is."""

from types import SimpleNamespace

import numpy as np

import runtime
from evaluation.exactness import first_difference, verify
from quasar.text import Prompt

PROMPTS = [Prompt(messages=({"role": "user", "content": text},)) for text in ("one two one two", "abc abc abc")]


def test_identical_on_a_real_engine(tiny_engine):
    with runtime.load(tiny_engine) as engine:
        found = verify(engine, PROMPTS, {"max_new_tokens": 40})
    assert (found.prompts, found.identical, found.divergences) == (2, 2, ())
    assert found.plain_width == 1
    assert found.drafted > 0
    assert found.accepted <= found.drafted
    value = found.to_json()
    assert list(value) == [
        *("prompts", "identical", "answers", "tokens", "plain_width", "rounds", "drafted", "accepted"),
        *("reused_tokens", "divergences", "acceptance_length"),
    ]


class Liar:
    """An engine whose speculative answer differs in one place of the second prompt, and is shorter in the third."""

    plain_width = 1

    def generate(self, messages, *, max_new_tokens, drafter):
        ids = [5, 6, 7, 8]
        if drafter != "none":
            ids = {"a": ids, "b": [5, 6, 9, 8], "c": [5, 6]}[messages[0]["content"]]
        stats = SimpleNamespace(tokens=len(ids), rounds=3, drafted=2, accepted=1, reused_tokens=0)
        return SimpleNamespace(token_ids=tuple(ids), stats=stats)

    def encode(self, messages, **options):
        assert options == {"drafter": "x", "max_new_tokens": 4}, "what the answers were made with, template options too"
        return np.array([1])

    def logits(self, token_ids):
        assert list(token_ids) == [1, 5, 6]
        return np.arange(20, dtype=np.float32)


def test_divergences_are_reported_with_their_logit_gap():
    prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in "abc"]
    found = verify(Liar(), prompts, {"drafter": "x", "max_new_tokens": 4})
    assert found.identical == 1
    different, shorter = found.divergences
    assert (different.prompt, different.turn, different.position, different.plain_id, different.speculative_id) == (
        1,
        1,
        2,
        7,
        9,
    )
    assert different.logit_gap == -2
    assert (shorter.prompt, shorter.position, shorter.plain_id, shorter.speculative_id) == (2, 2, 7, None)
    assert shorter.logit_gap is None


def test_options_may_come_as_one_object():
    asked = []

    class Asked:
        plain_width = 1

        def generate(self, messages, **options):
            asked.append(options)
            return Liar().generate(messages, drafter="none", max_new_tokens=4)

    options = runtime.GenerationOptions(max_new_tokens=4, drafter="x", num_draft_tokens=2)
    verify(Asked(), [Prompt(messages=({"role": "user", "content": "a"},))], {"options": options, "seed": 1})
    assert asked == [
        {"max_new_tokens": 4, "seed": 1, "drafter": "none"},
        {"max_new_tokens": 4, "seed": 1, "drafter": "x", "num_draft_tokens": 2},
    ]


def test_first_difference():
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
