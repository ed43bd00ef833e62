"""Generations whose tokens must never change: what is asked of which engine.

Texts are chosen so that noise on the logits, which is larger than what differs between CPUs, changes no token
(`record.py` refuses a case that it changes).
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime import Engine
from runtime.drafters.base import Draft

Ids = list[int]
Noise = Callable[[Any, Any], Any] | None

# What a case may ask; `record.py` takes the first of them that noise does not change.
TINY_PROMPTS = (
    *("abc xyz two abc 7 one", "one two two two", "12 kettle xyz abc xyz 7", "7 xyz abc 7", "abc 12 two 7 abc 7"),
    *("one two two kettle abc kettle 12 kettle", "kettle two one xyz one kettle xyz xyz 12 kettle"),
    *("kettle one abc one xyz one xyz kettle kettle two kettle two", "xyz 7 12 one kettle", "abc 12 kettle xyz"),
    *("abc two one 12 kettle one 12 kettle two 12 xyz two kettle", "12 one xyz two abc one two 12 7 xyz 12 two xyz"),
    *("12 12 xyz 7 two two 12 two one kettle two 12 kettle", "7 xyz abc 12 xyz", "kettle kettle abc two"),
)
REAL_PROMPTS = (
    *("Write the numbers from 1 to 10, one per line.", "Count from 1 to 20, and then from 1 to 20 again."),
    "Correct the spelling: The harbor is quiet in the mornning, the harbor is loud in the evening.",
    "Write a Python function add(a, b), then write the same function again with type hints.",
    *("Write a Python function that adds two numbers.", "Repeat: a b c d e f g a b c d e f g", "Say the alphabet."),
    *("Copy this line: to be or not to be, that is the question.", "List the days of the week."),
    *("What is the capital of France?", "Why is the sky blue? Say it twice."),
)


class Tree:
    """Proposes a small tree: the two tokens that followed the last one before, each with what followed it."""

    name = "tree"

    def propose(self, context: Any, max_tokens: int) -> Draft:
        """As `Drafter`."""
        places = [int(place) for place in np.flatnonzero(context[:-1] == context[-1])[::-1]]
        tokens: Ids = []
        parents: Ids = []
        for place in places:
            token = int(context[place + 1])
            if token in [have for have, parent in zip(tokens, parents, strict=True) if parent == -1]:
                continue
            if len(tokens) + 2 > max_tokens or parents.count(-1) == 2:
                break
            tokens.append(token)
            parents.append(-1)
            if place + 2 < len(context):
                tokens.append(int(context[place + 2]))
                parents.append(len(tokens) - 2)
        return Draft(tokens=np.array(tokens, np.int64), parents=np.array(parents, np.int64) if tokens else None)


def generate(engine: Engine, noise: Noise, prompt: Any, **options: Any) -> Ids:
    """One generation."""
    return list(engine.generate(prompt, **_noisy(options, noise)).token_ids)


def converse(engine: Engine, noise: Noise, *prompts: str, truncate: int = 0, fork: bool = False, **options: Any) -> Ids:
    """The answers of a conversation, one after the other; truncated or forked before the last turn."""
    ids: Ids = []
    with engine.session() as conversation:
        for prompt in prompts[:-1]:
            ids += conversation.generate(prompt, **_noisy(options, noise)).token_ids
        if truncate:
            conversation.truncate(truncate)
        last = conversation.fork() if fork else conversation
        ids += last.generate(prompts[-1], **_noisy(options, noise)).token_ids
        if fork:
            ids += conversation.generate(prompts[-1], **_noisy(options, noise)).token_ids
            last.close()
    return ids


def cancel(engine: Engine, noise: Noise, prompt: str, *, after: int, **options: Any) -> Ids:
    """A stream that is cancelled after some events; plain decoding, so that an event is a token."""
    signal = threading.Event()
    ids: Ids = []
    for count, event in enumerate(engine.stream(prompt, cancel=signal, drafter="none", **_noisy(options, noise)), 1):
        ids += event.token_ids
        if count == after:
            signal.set()
    return ids


def alternate(engine: Engine, noise: Noise, *prompts: str, **options: Any) -> Ids:
    """Streams that take turns, event by event; their tokens one stream after the other."""
    streams = [engine.stream(prompt, **_noisy(options, noise)) for prompt in prompts]
    ids: list[Ids] = [[] for _ in streams]
    live = dict(enumerate(streams))
    while live:
        for index, stream in list(live.items()):
            event = next(stream, None)
            if event is None:
                del live[index]
            else:
                ids[index] += event.token_ids
    return [token for own in ids for token in own]


def _noisy(options: dict[str, Any], noise: Noise) -> dict[str, Any]:
    return {**options, "logits_processor": noise} if noise is not None else options


def system(engine: Engine, noise: Noise, prompt: str, **options: Any) -> Ids:
    """Messages with a system prompt."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    return generate(engine, noise, messages, **options)


def token_ids(engine: Engine, noise: Noise, prompt: str, **options: Any) -> Ids:
    """A prompt of more than a prefill chunk, as token ids."""
    return generate(engine, noise, list(prompt.encode() * 40)[:300], **options)


@dataclass(frozen=True)
class Case:
    """`engine`: "old" (kept in this folder), "old-stock" (on stock kernels), "qwen3" or "smollm2" (built anew).

    `prompts`: how many the case has.
    """

    name: str
    engine: str
    run: Callable[..., Ids]
    prompts: int
    options: dict[str, Any] = field(default_factory=dict)


# Name → what is run, with how many prompts and which options.
_TINY: dict[str, tuple[Callable[..., Ids], int, dict[str, Any]]] = {
    "plain": (generate, 1, {"drafter": "none"}),
    "auto": (generate, 1, {}),
    "lookup": (generate, 1, {"drafter": "prompt-lookup", "num_draft_tokens": 5}),
    "suffix": (generate, 1, {"drafter": "suffix", "num_draft_tokens": 4}),
    "recycling": (generate, 1, {"drafter": "recycling", "num_draft_tokens": 4}),
    "system": (system, 1, {}),
    "raw": (generate, 1, {"chat_template": False}),
    "ids": (token_ids, 1, {}),
    "seeded": (generate, 1, {"temperature": 0.8, "top_p": 0.95, "seed": 7}),
    "top-k": (generate, 1, {"temperature": 1.1, "top_k": 20, "min_p": 0.01, "seed": 8, "drafter": "suffix"}),
    "penalties": (
        *(generate, 1),
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "min_new_tokens": 10}
        | {"logit_bias": {5: 2.0, 7: -np.inf}},
    ),
    "conversation": (converse, 3, {"max_new_tokens": 12}),
    "forked": (converse, 2, {"fork": True, "temperature": 0.7, "seed": 3, "max_new_tokens": 12}),
    "truncated": (converse, 2, {"truncate": 20, "max_new_tokens": 12}),
    "cancelled": (cancel, 1, {"after": 9}),
    "taking-turns": (alternate, 3, {"max_new_tokens": 12}),
    "tree": (generate, 1, {"drafter": Tree(), "num_draft_tokens": 6}),
    "drawn-tree": (generate, 1, {"drafter": Tree(), "num_draft_tokens": 6, "temperature": 0.6, "seed": 5}),
}
_STOCK = ("plain", "lookup", "seeded", "conversation", "ids")
_FLOAT = ("plain", "auto", "suffix", "seeded", "conversation", "tree", "ids")
_REAL: dict[str, tuple[Callable[..., Ids], int, dict[str, Any]]] = {
    "plain": (generate, 1, {"drafter": "none"}),
    "auto": (generate, 1, {"max_new_tokens": 64}),
    "lookup": (generate, 1, {"drafter": "prompt-lookup", "num_draft_tokens": 5}),
    "recycling": (generate, 1, {"drafter": "recycling"}),
    "tree": (generate, 1, {"drafter": Tree(), "num_draft_tokens": 6}),
    "seeded": (generate, 1, {"temperature": 0.5, "top_p": 0.9, "seed": 11}),
    "top-k": (generate, 1, {"temperature": 0.7, "top_k": 10, "seed": 2, "drafter": "suffix"}),
    "stop-string": (generate, 1, {"stop": ["5", "d", "st"]}),
    "stop-token": (generate, 1, {"stop": "<|im_end|>", "ignore_eos": True}),
    "cancelled": (cancel, 1, {"after": 7}),
    "conversation": (converse, 2, {"max_new_tokens": 12}),
    "taking-turns": (alternate, 2, {"max_new_tokens": 16}),
}


def _cases(
    engine: str, of: dict[str, tuple[Callable[..., Ids], int, dict[str, Any]]], names: Iterable[str]
) -> list[Case]:
    return [
        Case(
            name=f"{engine}-{name}",
            engine=engine,
            run=of[name][0],
            prompts=of[name][1],
            options={"max_new_tokens": 32, **of[name][2]},
        )
        for name in names
    ]


CASES = (
    _cases("old", _TINY, _TINY)
    + _cases("old-stock", _TINY, _STOCK)
    + _cases("qwen3", _TINY, _FLOAT)
    + _cases("smollm2", _REAL, _REAL)
)
