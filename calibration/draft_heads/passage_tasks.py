"""Requests about a passage: what users give a model to read, made of what the model wrote before.

A model that writes a user's words seldom writes a text to go with them, so a head that learned from such words alone
has never seen an answer that is taken from the prompt. What this text brings a head is in docs/drafters.md.
"""

from dataclasses import dataclass

import numpy as np

_PLACE = "{passage}"
# Of requests that a question follows, which the model writes.
_QUESTIONS = (
    "Answer the question based on the following passage.\n\n{passage}\n\nQuestion:",
    "{passage}\n\nBased on the text above, answer this question:",
    "Context: {passage}\n\nQuestion:",
    "Read this text:\n\n{passage}\n\n",
)
_LANGUAGES = ("German", "French", "Spanish", "Italian", "English", "Chinese")
_TASKS = (
    "Summarize the following text:\n\n{passage}",
    "Give a short summary of this article.\n\n{passage}",
    "{passage}\n\nSummarize the text above in two sentences.",
    "Rewrite the following text in simpler words:\n\n{passage}",
    "List the main points of this text:\n\n{passage}",
    "Extract all names, places and numbers from the following text:\n\n{passage}",
    "Correct the mistakes in the following text:\n\n{passage}",
    "Continue this text:\n\n{passage}",
    *(f"Translate the following text to {language}:\n\n{{passage}}" for language in _LANGUAGES),
)
# How often the model writes the rest of the request.
_SHARE_OF_QUESTIONS = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageTask:
    """A user's words about a passage; `is_open`: a question is to follow, in the model's words."""

    words: str
    is_open: bool


def draw_passage_task(passage: str, random: np.random.Generator) -> PassageTask:
    """One of the requests, about this passage."""
    is_open = bool(random.random() < _SHARE_OF_QUESTIONS)
    forms = _QUESTIONS if is_open else _TASKS
    return PassageTask(words=forms[int(random.integers(len(forms)))].replace(_PLACE, passage), is_open=is_open)
