"""What a generation can be asked for: each option with its default, meaning, check and command line.

A new option is written twice: as a field here, and in `runtime.option_keywords.OptionsDict` for type checkers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from plugins.sample_token import LEAST_TEMPERATURE, MOST_TEMPERATURE, Filters
from quasar.errors import GenerationError
from quasar.text import ChatOptions
from runtime.chat_options import chat_options
from runtime.drafters.named import DrafterOption, as_list
from runtime.grammar.formats import Grammar, ResponseFormat, read_format, read_schema_file
from runtime.option_fields import (
    Flag,
    anything,
    as_tuple,
    boolean,
    check_biases,
    describe,
    integer,
    is_integer,
    metadata_of,
    must,
    number,
    option,
    or_none,
    read_arguments,
    read_biases,
    read_list,
    read_text_file,
)
from runtime.traces import Recorder

LogitsProcessor = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]


class Signal(Protocol):
    """What cancels a generation: a `threading.Event`, or anything like it."""

    def is_set(self) -> bool:
        """Whether to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Every option of a generation, checked: a `GenerationError` names the option that cannot be honoured.

    Methods that generate take it as `options=`, and each option as a keyword; keywords given beside `options=` take the
    place of its fields.

    The answer does not depend on `drafter`, `prediction`, `num_draft_tokens`, `priority`, `cache_salt` or `recorder`;
    `deadline` and `cancel` only cut it.

    Logits pass, in this order: `logit_bias`, the penalties, `min_new_tokens`, `logits_processor`, `temperature`,
    `top_k`, `top_p`, `min_p`; each as transformers has it, presence and frequency as vLLM and OpenAI do. What
    `response_format` forbids is excluded before the temperature.
    """

    max_new_tokens: int = option(
        256,
        'the answer ends with finish_reason "length" there, or where the KV cache is full.',
        integer(1),
        Flag(int, "N"),
    )
    min_new_tokens: int = option(
        0,
        "no end id, stop id or stop string before so many.",
        integer(0),
        Flag(int, "N", "No end of the answer before so many."),
    )
    temperature: float = option(
        0.0,
        "0 takes the most likely token; above, tokens are drawn.",
        number(
            lambda value: value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE,
            "0 (the most likely token), or 1e-6 to 1e6",
        ),
        Flag(float, "T", "0 takes the likeliest token."),
    )
    top_k: int = option(
        0,
        "only so many most likely tokens (ties stay); 0 keeps all.",
        integer(0),
        Flag(int, "N", "Only the N likeliest tokens; 0: all."),
    )
    top_p: float = option(
        1.0,
        "only the most likely tokens that together have this probability.",
        number(lambda value: 0 < value <= 1, "more than 0 and at most 1"),
        Flag(float, "P", "Only the likeliest tokens that make up P."),
    )
    min_p: float = option(
        0.0,
        "only tokens that have this share of the most likely one's probability.",
        number(lambda value: 0 <= value <= 1, "0 to 1"),
        Flag(float, "P", "Only tokens with P times the likeliest one's."),
    )
    repetition_penalty: float = option(
        1.0,
        "logits of tokens in prompt or answer are divided by it (multiplied where negative).",
        number(lambda value: value > 0, "more than 0 (1 does nothing)"),
        Flag(float, "X", "Of tokens in prompt or answer."),
    )
    presence_penalty: float = option(
        0.0,
        "subtracted from the logits of tokens in the answer so far.",
        number(lambda value: True, "a number"),
        Flag(float, "X", "Of tokens in the answer."),
    )
    frequency_penalty: float = option(
        0.0,
        "the same, times how often they are there.",
        number(lambda value: True, "a number"),
        Flag(float, "X", "The same, times how often."),
    )
    logit_bias: Mapping[int, float] | None = option(
        None,
        "token id → what is added to its logit; -inf excludes it.",
        check_biases,
        Flag(list[str] | None, "ID=X …", "Added to these tokens' logits.", read=read_biases, continues=r"\d+=.+"),
    )
    logits_processor: LogitsProcessor | None = option(
        None,
        "called with the context (int64 [n]: prompt, answer, and the accepted drafts on the position's path; read "
        "only) and the position's logits (float32 [V]), returns logits [V]. It must depend on these two alone.",
        or_none(must(callable, "a function was expected")),
    )
    response_format: ResponseFormat | None = option(
        None,
        'what the answer looks like: {"type": "text"}, "json_object", "json_schema" (as OpenAI has them), "regex" or '
        '"grammar" (docs/runtime.md); an answer that ends with "length" may be cut.',
        anything,
        Flag(
            Path | None,
            "FILE.json",
            "The answer is JSON that this schema describes.",
            read=read_schema_file,
            rank=1,
            name="--json-schema",
        ),
    )
    seed: int | None = option(
        None,
        "of the draws, 0 to 2^64 - 1; None draws one. The same seed gives the same answer.",
        or_none(integer(0, 2**64 - 1, "0 to 2^64 - 1")),
        Flag(int | None, "N", "The same seed draws the same answer."),
    )
    stop: str | Sequence[str] | None = option(
        None,
        "strings that end the answer before them.",
        anything,
        Flag(list[str] | None, "TEXT", "Ends the answer; may be given again.", read=read_list),
    )
    stop_token_ids: Sequence[int] | None = option(
        None,
        "ids that end the answer, besides the model's end ids.",
        anything,
        Flag(list[int] | None, "ID …", "End the answer.", read=read_list, continues=r"\d+"),
    )
    ignore_eos: bool = option(
        False, "go on after the model's end ids.", boolean, Flag(bool, help="Go on after the model's end tokens.")
    )
    logprobs: int | None = option(
        None,
        "log-probabilities of every emitted token and of so many most likely ones, from the model's own logits.",
        or_none(integer(0, 100, "0 to 100")),
    )
    deadline: float | None = option(
        None,
        'seconds from the call until the answer ends with finish_reason "deadline".',
        or_none(number(lambda value: value > 0, "seconds, more than 0")),
        Flag(float | None, "S", "Seconds after which the answer ends.", rank=3),
    )
    cancel: Signal | None = option(
        None,
        'a threading.Event, say, that ends the answer within one round, with finish_reason "cancelled".',
        or_none(must(lambda value: hasattr(value, "is_set"), "a threading.Event, or the like, was expected")),
    )
    drafter: DrafterOption = option(
        "auto",
        'what proposes tokens: "auto", "none", "prompt-lookup[:MIN-MAX]", "suffix", "recycling[:kept]", "eagle", '
        '"model:DIR", "self[:DIR]", "hierarchical:DIR[+DIR]", any `Drafter`, or several, of which the controller '
        "takes what pays, round by round (docs/drafters.md).",
        anything,
        Flag(
            str,
            "NAME[,NAME]",
            "auto, none, prompt-lookup[:MIN-MAX], suffix, recycling[:kept], eagle, model:DIR, self[:DIR], "
            "hierarchical:DIR[+DIR]; of several, what pays is taken round by round.",
            rank=3,
        ),
    )
    prediction: str | Sequence[int] | None = option(
        None,
        "a text (or token ids) that the answer will resemble, such as a file that is to be edited: it is drafted from, "
        "beside what `drafter` proposes (docs/drafters.md).",
        anything,
        Flag(
            Path | None,
            "FILE",
            "A text that the answer will resemble: drafts are taken from it.",
            read=read_text_file,
            rank=3,
        ),
    )
    num_draft_tokens: int | None = option(
        None,
        "drafts per round, at most; one drafter then drafts up to so many in every round. None leaves it to the "
        "controller.",
        or_none(integer(0)),
        Flag(
            int | None,
            "K",
            "Drafts per round, at most; one drafter then drafts up to K every round (default: what pays).",
            rank=3,
        ),
    )
    chat_template: bool | str = option(
        True,
        "False feeds a string as it stands; a name takes that one of the checkpoint's named templates.",
        anything,
        Flag(str, "NAME", "One of the engine's named templates.", default="", read=lambda name: name or True, rank=2),
    )
    tools: Sequence[Mapping[str, Any]] | None = option(
        None, "descriptions of functions for the chat template.", anything
    )
    chat_template_kwargs: Mapping[str, Any] | None = option(
        None,
        'further arguments of the chat template, such as {"enable_thinking": False}.',
        anything,
        Flag(
            list[str] | None,
            "KEY=VALUE",
            "An argument of the chat template, as JSON or text: enable_thinking=false.",
            read=read_arguments,
            rank=1,
            name="--template-arg",
        ),
    )
    continue_final_message: bool = option(
        False,
        "the last message is an answer that was begun; it is continued.",
        boolean,
        Flag(bool, help="Go on with an assistant's message at the end.", rank=2),
    )
    parse_special: bool = option(
        False,
        "special tokens that a message spells are control tokens; else they are text. A string that is fed as it "
        "stands always has control tokens.",
        boolean,
        Flag(bool, help="Special tokens in messages are control tokens.", rank=2),
    )
    date: str | None = option(
        None,
        "what a template is told that asks for the day, as 2026-01-01; None takes the engine's own, which is fixed.",
        anything,
        Flag(str | None, "YYYY-MM-DD", "The day that templates are told.", rank=2),
    )
    sampling: str = option(
        "own",
        '"own" takes the defaults written here; "model" the checkpoint\'s (temperature, top_k, top_p, min_p, '
        "repetition_penalty, as far as it has them) for what is not given. A field of `options=` that has its default "
        "is not given.",
        must(lambda value: value in ("own", "model"), "'own' or 'model' was expected"),
        Flag(
            bool,
            help="Sample as the checkpoint suggests (default: greedy).",
            default=False,
            read=lambda model: "model" if model else "own",
            rank=2,
            name="--model-defaults",
        ),
    )
    priority: int = option(
        0,
        "lower ones go first where requests wait for each other.",
        must(is_integer, "an integer was expected"),
    )
    cache_salt: str | None = option(
        None,
        "requests with the same salt may start from each other's positions where their prompts begin alike, which"
        " shows in how long the first token takes; none: only where the engine was loaded with"
        ' prefix_cache="shared".',
        or_none(must(lambda value: isinstance(value, str), "a string was expected")),
    )
    recorder: Recorder | None = option(
        None,
        "a `Recorder` that the generation is written to, for `python -m evaluation simulate`.",
        or_none(must(lambda value: isinstance(value, Recorder), "a runtime.Recorder was expected")),
    )
    # `response_format`, `stop` and `stop_token_ids`, read once.
    grammar: Grammar | None = field(init=False, repr=False)
    stop_strings: tuple[str, ...] = field(init=False, repr=False)
    stop_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every value; raises `GenerationError` naming the option."""
        for one in OPTIONS:
            metadata_of(one).check(one.name, getattr(self, one.name))
        if self.min_new_tokens > self.max_new_tokens:
            raise GenerationError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; at most that many "
                "were expected"
            )
        strings = (self.stop,) if isinstance(self.stop, str) else as_tuple("stop", self.stop, "strings")
        if not all(isinstance(one, str) and one for one in strings):
            raise GenerationError(f"stop is {self.stop!r}; strings that are not empty were expected")
        ids = as_tuple("stop_token_ids", self.stop_token_ids, "token ids")
        if not all(is_integer(token) for token in ids):
            raise GenerationError(f"stop_token_ids is {self.stop_token_ids!r}; token ids were expected")
        predicted = self.prediction
        if predicted is not None and not isinstance(predicted, str):
            predicted = as_tuple("prediction", predicted, "a text, or token ids,")
            if not all(is_integer(token) for token in predicted):
                raise GenerationError(f"prediction is {self.prediction!r}; a text, or token ids, were expected")
            object.__setattr__(self, "prediction", tuple(int(token) for token in predicted))
        # What was read is kept: an iterator would be empty when these options are used again.
        for name, value in (("stop", strings), ("stop_token_ids", ids)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "stop_strings", strings)
        object.__setattr__(self, "stop_ids", frozenset(int(token) for token in ids))
        grammar = read_format("response_format", self.response_format)
        object.__setattr__(self, "grammar", grammar)
        if grammar is not None and self.ignore_eos:
            raise GenerationError(
                "ignore_eos came with a response_format, which says where the answer ends: pass one or the other"
            )
        _ = self.chat  # checks what it is made of
        for drafter in as_list(self.drafter):
            if not isinstance(drafter, str) and not hasattr(drafter, "propose"):
                raise GenerationError(f"drafter is {drafter!r}; a name, or an object with propose, was expected")

    @property
    def chat(self) -> ChatOptions | None:
        """How a conversation is rendered; None: no chat template."""
        return chat_options(
            chat_template=self.chat_template,
            tools=self.tools,
            arguments=self.chat_template_kwargs,
            continue_final_message=self.continue_final_message,
            date=self.date,
            parse_special=self.parse_special,
        )

    @property
    def filters(self) -> Filters:
        """What the sampler draws from."""
        return Filters(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to logits before a token is chosen."""
        return (
            bool(self.logit_bias)
            or self.logits_processor is not None
            or self.min_new_tokens > 0
            or (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `GenerationError` if an id that an option names is outside the vocabulary."""
        predicted = () if isinstance(self.prediction, str) else self.prediction or ()
        named = (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_ids), ("prediction", predicted))
        for name, ids in named:
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise GenerationError(f"{name} names the token id {token}, outside the vocabulary of {vocab_size}")


OPTIONS = tuple(one for one in fields(GenerationOptions) if one.init)
GenerationOptions.__doc__ = f"{GenerationOptions.__doc__}\n{describe(OPTIONS)}"
