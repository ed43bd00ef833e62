"""Scores of answers against references, and their intervals."""

import json
import math

import numpy as np
import pytest

from evaluation.accuracy import (
    accuracy,
    bootstrap_interval,
    exact_match,
    final_number,
    metric_of,
    rouge_l,
    wilson_interval,
)
from quasar.errors import PromptError
from quasar.text import Prompt, read_prompts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("850/50 = <<850/50=17>>17 bags\n#### 306", 306),
        ("So the total is $1,234.50.", 1234.5),
        ("It falls to -7 degrees.", -7),
        ("#### none, but 4 before", 4),
        ("no number", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_exact_match():
    assert exact_match("That is 17 x 18 = 306 dollars", "17 * 18 = 306\n#### 306") == 1
    assert exact_match("I bought 306 bags, 4 of them red", "#### 306") == 0
    assert exact_match("I do not know", "#### 306") == 0
    assert exact_match("19", "19%") == 1
    assert exact_match(" Paris ", "paris") == 1


def test_rouge_l_is_the_longest_common_subsequence():
    # Four of five words in order: precision 4/5, recall 4/4.
    assert rouge_l("the old cat sat down", "the cat sat down") == pytest.approx(2 * 0.8 / 1.8)
    assert rouge_l("", "the cat") == 0


def test_wilson_interval():
    """Against the closed form's root: the interval's ends are where the score test is just not rejected."""
    found = wilson_interval(np.array([1.0] * 3 + [0.0] * 37))
    for end in (found["low"], found["high"]):
        assert abs(0.075 - end) / math.sqrt(end * (1 - end) / 40) == pytest.approx(1.96, abs=1e-3)
    none = wilson_interval(np.zeros(20))
    assert none["low"] == 0
    assert 0.1 < none["high"] < 0.2


def test_bootstrap_interval_covers_the_mean_and_narrows():
    random = np.random.default_rng(1)
    few, many = (bootstrap_interval(random.uniform(size=n)) for n in (20, 2000))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]
    # The standard error falls with the root of n, here to a tenth.
    assert (many["high"] - many["low"]) == pytest.approx((few["high"] - few["low"]) / 10, rel=0.4)


class Answers:
    """Stands for an engine."""

    def __init__(self, *texts):
        self._texts = list(texts)

    def generate(self, messages, *, max_new_tokens):
        assert max_new_tokens == 9
        return type("Answer", (), {"text": self._texts.pop(0)})


def prompt(category, reference):
    return Prompt(messages=({"role": "user", "content": "?"},), category=category, reference=reference)


def test_engines_are_scored_on_the_same_prompts():
    rows = [prompt("math", "#### 4"), prompt("math", "#### 5"), prompt("qa", "x"), prompt("summarization", "a b c")]
    found = accuracy(
        {"float": Answers("4", "5", "a b c"), "quantized": Answers("4", "6", "a b")}, rows, max_new_tokens=9
    )
    maths = found["exact match"]
    assert [maths["engines"][name]["mean"] for name in ("float", "quantized")] == [1, 0.5]
    assert maths["difference"]["mean"] == -0.5
    assert found["ROUGE-L"]["engines"]["quantized"]["mean"] == pytest.approx(0.8)
    assert found["ROUGE-L"]["engines"]["float"]["count"] == 1


def test_prompts_without_references_are_refused():
    with pytest.raises(PromptError, match="no prompt has a reference for a task"):
        accuracy({"quantized": Answers()}, [prompt("math", ""), prompt("qa", "x")], max_new_tokens=9)


def test_references_of_prompt_files(tmp_path):
    path = tmp_path / "prompts.jsonl"
    references = ["one", ["first", "second"], [["nested"]], [], None, 7]
    path.write_text("".join(json.dumps({"prompt": "?", "reference": value}) + "\n" for value in references))
    assert [row.reference for row in read_prompts(path)] == ["one", "first", "nested", "", "", ""]


def test_categories():
    assert [metric_of(name) for name in ("math", "math_reasoning", "summarization", "qa")] == [
        "exact match",
        "exact match",
        "ROUGE-L",
        None,
    ]
