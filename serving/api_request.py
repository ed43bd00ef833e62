"""A request, read and checked: prompts, options of the runtime, and what the answer is to look like."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.prompt_ids import Prompt
from serving.api_errors import ApiError, ErrorAnswer, invalid, too_long
from serving.sampling_fields import MOST_CHOICES
from serving.structured_fields import AnswerFormat
from serving.tools.call_formats import CallFormat
from serving.tools.call_parser import CallRules


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a request is read for.

    Attributes:
        defaults: options of the runtime that stand for what a request does not give.
        template: the source of the chat template, "" without one.
        max_length: tokens that a sequence may have.
        token_limit: new tokens that a request may ask for; None: any number.
        calls: how answers call functions; None: they cannot, and `no_calls` says why.
    """

    name: str
    defaults: Mapping[str, Any]
    template: str
    max_length: int
    token_limit: int | None = None
    calls: CallFormat | None = None
    no_calls: str = ""

    @property
    def max_tokens(self) -> int:
        """New tokens of an answer, where a request does not say."""
        return self.max_length if self.token_limit is None else min(self.token_limit, self.max_length)

    @property
    def longest_prompt(self) -> int:
        """Characters of a prompt that surely does not fit: nothing is gained by tokenizing it."""
        return 32 * self.max_length

    def check_name(self, fields: Mapping[str, Any]) -> None:
        """Raise `ApiError` unless the request names this model."""
        if "model" not in fields:
            raise invalid("model", f"model is missing; {self.name!r} is served here", "missing_required_parameter")
        if fields["model"] != self.name:
            raise no_such_model(fields["model"], self.name)

    def check_tokens(self, fields: Mapping[str, Any]) -> None:
        """Raise `ApiError` for more new tokens than this server gives to one answer."""
        for name in ("max_completion_tokens", "max_tokens"):
            if self.token_limit is not None and fields.get(name, 0) > self.token_limit:
                raise invalid(name, f"{name} is {fields[name]}; at most {self.token_limit} was expected")

    def check_length(self, param: str, characters: int, what: str = "prompt") -> None:
        """Raise `ApiError` for a prompt (or `what`) of so many characters if it cannot fit."""
        if characters > self.longest_prompt:
            message = f"the {what} has {characters} characters, more than these can be: shorten it"
            raise too_long(param, self.max_length, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRequest:
    """A request for one or more answers.

    Attributes:
        prompts: each gets `n` answers.
        options: of `Engine.stream`, for the first answer; `options_of` has the others'.
        logprobs: how many likeliest tokens are told beside each of the answer's; None: not even that one.
        return_rounds: the rounds are told beside the text.
        echo: texts that the answers begin with, one for each prompt; empty for none.
        calls: how calls of functions are read from the answers; None: nothing may be called.
        option_fields: option of the runtime → the field of this request that it came from, where that differs.
        user: who OpenAI's clients say that they ask for; for the log.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    options: Mapping[str, Any]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    echo: tuple[str, ...] = ()
    return_token_ids: bool = False
    return_rounds: bool = False
    calls: CallRules | None = None
    option_fields: Mapping[str, str] = field(default_factory=dict)
    user: str = ""

    @property
    def choices(self) -> int:
        """How many answers there are."""
        return self.n * len(self.prompts)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of an answer."""
        return self.prompts[index // self.n]

    def options_of(self, index: int) -> dict[str, Any]:
        """The options of an answer: a seed that was given is the first one's, and each further one has the next."""
        options = dict(self.options)
        if "seed" in options:
            options["seed"] = (options["seed"] + index) % 2**64
        return options


def make_request(
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    chat: bool,
    prompts: tuple[Prompt, ...],
    key: str,
    logprobs: int | None = None,
    wanted: AnswerFormat | None = None,
    echo: tuple[str, ...] = (),
    calls: CallRules | None = None,
) -> ApiRequest:
    """The request that checked fields make, with what chats and completions have in common.

    `options`: those of the runtime that are not read here; `wanted`: what the answer looks like; `key`: what tells the
    sender from others. The rest is `ApiRequest`'s.

    Raises `ApiError` for too many answers, and for fields that contradict each other.
    """
    n = fields.get("n", 1)
    _check_choices(n * len(prompts))
    stream, include_usage = _streaming(fields)
    options = dict(options)
    if logprobs is not None:
        options["logprobs"] = logprobs
    if wanted is not None:
        options["response_format"] = wanted.value
    salt = salt_of(fields, key, n)
    if salt is not None:
        options["cache_salt"] = salt
    return ApiRequest(
        chat=chat,
        prompts=prompts,
        options=options,
        n=n,
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        echo=echo,
        return_token_ids=fields.get("return_token_ids", False),
        return_rounds=fields.get("return_rounds", False),
        calls=calls,
        option_fields={} if wanted is None else {"response_format": wanted.field},
        user=fields.get("safety_identifier", ""),
    )


def salt_of(fields: Mapping[str, Any], key: str, n: int) -> str | None:
    """Whose positions may serve a prompt: requests that came with the same key and name the same cache.

    `prompt_cache_key` is OpenAI's name for it, `user` its earlier one, `cache_salt` vLLM's. Answers to one prompt serve
    each other in any case.
    """
    for name in ("cache_salt", "prompt_cache_key", "user"):
        if name in fields:
            return f"{key}/{fields[name]}"
    return f"{key}//{secrets.token_hex(8)}" if n > 1 else None


def _streaming(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether its usage is told at the end."""
    stream = bool(fields.get("stream", False))
    if "stream_options" in fields and not stream:
        raise invalid("stream_options", "stream_options are for streams: leave them out, or set stream to true")
    return stream, bool(fields.get("stream_options", {}).get("include_usage", False))


def _check_choices(count: int) -> None:
    """Raise `ApiError` if a request asks for too many answers."""
    if count > MOST_CHOICES:
        raise invalid("n", f"the request asks for {count} answers; at most {MOST_CHOICES} were expected")


def no_such_model(asked: str, name: str) -> ApiError:
    """Status 404, in OpenAI's words for it."""
    return ApiError(
        ErrorAnswer(
            status=404,
            message=f"the model {asked[:60]!r} does not exist; {name!r} is served here",
            param="model",
            code="model_not_found",
        )
    )
