"""What `verify --concurrency` counts as the same answer."""

from types import SimpleNamespace

import pytest

from evaluation.concurrency import verify_together
from quasar.text import Prompt

PROMPTS = [Prompt(messages=({"role": "user", "content": str(number)},)) for number in range(4)]
ANSWER = tuple(range(9))


class FakeEngine:
    """Alone it says nine tokens; beside others so many, and then ends."""

    def __init__(self, tokens):
        self._tokens = tokens

    def generate(self, messages, **options):
        return SimpleNamespace(token_ids=ANSWER)

    def stream(self, messages, cancel, **options):
        for place, token in enumerate(ANSWER[: self._tokens]):
            cancelled, last = cancel.is_set(), place == self._tokens - 1
            reason = "cancelled" if cancelled else "stop" if last else None
            yield SimpleNamespace(token_ids=() if cancelled else (token,), drafted=1, finish_reason=reason)
            if cancelled:
                return

    def metrics(self):
        return SimpleNamespace(since=lambda before: SimpleNamespace(sequences_per_pass={}))


@pytest.mark.parametrize(("tokens", "identical"), [(9, 4), (5, 0)])
def test_an_answer_that_ends_too_early_differs_whoever_would_have_cancelled_it_later(tokens, identical, monkeypatch):
    monkeypatch.setattr("evaluation.concurrency._MOST_EVENTS", 10**6)
    monkeypatch.setattr("evaluation.concurrency._PAUSE", 0.0)
    # Draws of the seed leave after more events than there are.
    found = verify_together(FakeEngine(tokens), PROMPTS, {}, concurrency=2, cancel_share=1.0, seed=3)
    assert (found.identical, found.cancelled) == (identical, 0)


def test_what_was_cancelled_is_the_beginning_of_the_answer(monkeypatch):
    monkeypatch.setattr("evaluation.concurrency._MOST_EVENTS", 2)
    monkeypatch.setattr("evaluation.concurrency._PAUSE", 0.0)
    found = verify_together(FakeEngine(9), PROMPTS, {}, concurrency=2, cancel_share=1.0)
    assert (found.identical, found.cancelled) == (4, 4)
