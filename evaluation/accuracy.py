"""`accuracy`: how well engines do tasks with known answers: maths by exact match, summaries by ROUGE-L."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import PromptError, QuasarError
from quasar.text import Prompt
from runtime.api import Engine

EXACT, ROUGE = "exact match", "ROUGE-L"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# GSM8K's references end in this and the answer.
_FINAL = "####"
# Of an answer, where nothing else is asked for.
MAX_NEW_TOKENS = 256
_CONFIDENCE = 0.95
_RESAMPLES = 2000

Scores = NDArray[np.float64]


def metric_of(category: str) -> str | None:
    """Maths by exact match, summaries by ROUGE-L, the rest not at all."""
    if category.startswith("math"):
        return EXACT
    return ROUGE if category.startswith("summar") else None


def final_number(text: str) -> float | None:
    """The number after the last "####", or else the last number; commas group digits."""
    found = _NUMBER.findall(text.rpartition(_FINAL)[2]) or _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def exact_match(answer: str, reference: str) -> float:
    """1 if both texts come to the same number, or hold the same words where the reference has none; else 0."""
    expected = final_number(reference)
    if expected is None:
        return float(answer.casefold().split() == reference.casefold().split())
    found = final_number(answer)
    return float(found is not None and math.isclose(found, expected, rel_tol=1e-9))


def rouge_l(answer: str, reference: str) -> float:
    """The F-measure of the longest common subsequence of words, stemmed (Lin 2004, by the library rouge-score)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise QuasarError(
            "rouge-score is not installed; ROUGE-L needs it: run pip install 'quasar-verifier[evaluation]'"
        ) from None
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def accuracy(
    engines: Mapping[str, Engine],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Metric → `engines` (name → score) and `difference`, paired, of the last engine from the first.

    Answers are greedy; only prompts with references count. Raises `PromptError` if there are none of a task.
    """
    by_metric: dict[str, list[Prompt]] = {EXACT: [], ROUGE: []}
    for prompt in prompts:
        metric = metric_of(prompt.category)
        if metric is not None and prompt.reference:
            by_metric[metric].append(prompt)
    if not any(by_metric.values()):
        raise PromptError(
            'no prompt has a reference for a task; a row like {"category": "math", "prompt": "…", "reference": "42"} '
            "or of a category that begins with summar was expected"
        )
    # What is missing is said before the first answer.
    _stats()
    if by_metric[ROUGE]:
        rouge_l("", "")
    results: dict[str, Any] = {}
    for metric, chosen in by_metric.items():
        score = exact_match if metric == EXACT else rouge_l
        scores: dict[str, list[float]] = {name: [] for name in engines}
        for prompt in chosen:
            for name, engine in engines.items():
                answer = engine.generate(prompt.messages, max_new_tokens=max_new_tokens)
                scores[name].append(score(answer.text, prompt.reference))
            on_prompt()
        if chosen:
            results[metric] = _summary({name: np.array(found) for name, found in scores.items()}, metric)
    return results


def num_scored(prompts: Sequence[Prompt]) -> int:
    """How many prompts `accuracy` will ask."""
    return sum(map(is_scored, prompts))


def is_scored(prompt: Prompt) -> bool:
    """Whether `accuracy` will ask it."""
    return metric_of(prompt.category) is not None and bool(prompt.reference)


def _summary(scores: Mapping[str, Scores], metric: str) -> dict[str, Any]:
    names = list(scores)
    summary: dict[str, Any] = {
        "engines": {
            name: wilson_interval(found) if metric == EXACT else bootstrap_interval(found)
            for name, found in scores.items()
        }
    }
    if len(names) > 1:
        summary["difference"] = bootstrap_interval(scores[names[-1]] - scores[names[0]])
    return summary


def wilson_interval(hits: Scores) -> dict[str, float]:
    """`mean`, `low`, `high` and `count`: the share of ones among zeros and ones, with Wilson's 95 % interval (1927)."""
    ends = _stats().binomtest(int(hits.sum()), len(hits)).proportion_ci(_CONFIDENCE, method="wilson")
    return {"mean": float(hits.mean()), "low": float(ends.low), "high": float(ends.high), "count": len(hits)}


def bootstrap_interval(scores: Scores) -> dict[str, float]:
    """As above: the mean with a 95 % percentile bootstrap over prompts; the same scores give the same interval."""
    mean = float(scores.mean())
    if len(scores) == 1:
        # Every resample of one score is that score; scipy takes two or more.
        return {"mean": mean, "low": mean, "high": mean, "count": 1}
    found = _stats().bootstrap(
        (scores,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    ends = found.confidence_interval
    return {"mean": mean, "low": float(ends.low), "high": float(ends.high), "count": len(scores)}


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise QuasarError(
            "scipy is not installed; intervals need it: run pip install 'quasar-verifier[evaluation]'"
        ) from None
    return stats
