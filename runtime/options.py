"""What a generation can be asked for: one definition of every option, its default and what it may be."""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from plugins.sample_token import LEAST_TEMPERATURE, MOST_TEMPERATURE, Filters
from quasar.errors import GenerationError
from quasar.text import ChatOptions
from runtime.chat_options import chat_options
from runtime.drafters.registry import DrafterOption, as_list
from runtime.traces import Recorder

# Where what is not given comes from.
SAMPLING = ("own", "model")
_MOST_LOGPROBS = 100
_SEEDS = 1 << 64
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

LogitsProcessor = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]


class Signal(Protocol):
    """What cancels a generation: a `threading.Event`, or anything like it."""

    def is_set(self) -> bool:
        """Whether to stop."""


class OptionsDict(TypedDict, total=False):
    """The options as keywords; `GenerationOptions` says what they mean."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logits_processor: LogitsProcessor | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    logprobs: int | None
    deadline: float | None
    cancel: Signal | None
    drafter: DrafterOption
    num_draft_tokens: int | None
    chat_template: bool | str
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool
    parse_special: bool
    date: str | None
    sampling: str
    recorder: Recorder | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Every option of a generation.

    The tokens do not depend on `drafter`, `num_draft_tokens` or `recorder`; `deadline` and `cancel` only cut the text.

    Logits pass, in this order: `logit_bias`, the penalties, `min_new_tokens`, `logits_processor`, `temperature`,
    `top_k`, `top_p`, `min_p`; each as transformers has it, presence and frequency as vLLM and OpenAI do.

    max_new_tokens: the text ends with finish_reason "length" there, or where the KV cache is full.
    min_new_tokens: no end id, stop id or stop string before so many.
    temperature: 0 takes the most likely token; above, tokens are drawn.
    top_k: only so many most likely tokens (ties stay); 0 keeps all.
    top_p: only the most likely tokens that together have this probability.
    min_p: only tokens that have this share of the most likely one's probability.
    repetition_penalty: logits of tokens in prompt or text are divided by it (multiplied where negative).
    presence_penalty: subtracted from the logits of tokens in the text so far.
    frequency_penalty: the same, times how often they are there.
    logit_bias: token id → what is added to its logit; -inf excludes it.
    logits_processor: called with the context (int64 [n]: prompt, text, and the accepted drafts on the row's path; read
        only) and the row's logits (float32 [V]), returns logits [V]. It must depend on these two alone.
    seed: of the draws, 0 to 2^64 - 1; None draws one. The same seed gives the same text.
    stop: strings that end the text in front of them.
    stop_token_ids: ids that end the text, besides the model's end ids.
    ignore_eos: go on behind the model's end ids.
    logprobs: log-probabilities of every emitted token and of so many most likely ones, from the model's own logits.
    deadline: seconds from the call until the text ends with finish_reason "deadline".
    cancel: a threading.Event, say, that ends the text within one round, with finish_reason "cancelled".
    drafter: what proposes tokens: "auto", "none", "prompt-lookup[:MIN-MAX]", "suffix", "recycling[:kept]", "model:DIR",
        "self:DIR", "hierarchical:DIR", any `Drafter`, or several of these, of which the controller takes what pays,
        round by round (docs/drafters.md).
    num_draft_tokens: drafts per round, at most; one drafter then drafts up to so many in every round. None leaves it to
        the controller.
    chat_template: False feeds a string as it stands; a name takes that one of the checkpoint's named templates.
    tools: descriptions of functions for the chat template.
    chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": False}.
    continue_final_message: the last message is an answer that was begun; the text goes on with it.
    parse_special: special tokens that a message spells are control tokens; else they are text. A string that is fed as
        it stands always has control tokens.
    date: what a template is told that asks for the day, as 2026-01-01; None takes the engine's own, which is fixed.
    sampling: "own" takes the defaults written here; "model" the checkpoint's (temperature, top_k, top_p, min_p,
        repetition_penalty, as far as it has them) for what is not given.
    recorder: a `Recorder` that the generation is written to, for `python -m evaluation simulate`.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    deadline: float | None = None
    cancel: Signal | None = None
    drafter: DrafterOption = "auto"
    num_draft_tokens: int | None = None
    chat_template: bool | str = True
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    date: str | None = None
    sampling: str = "own"
    recorder: Recorder | None = None
    # `stop` and `stop_token_ids`, read once.
    stop_strings: tuple[str, ...] = field(init=False, repr=False)
    stop_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every value; raises `GenerationError` naming the option."""
        self._check_integer("max_new_tokens", 1)
        self._check_integer("min_new_tokens", 0)
        self._check_integer("top_k", 0)
        self._check_number(
            "temperature",
            lambda value: value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE,
            "0 (the most likely token), or 1e-6 to 1e6",
        )
        self._check_number("top_p", lambda value: 0 < value <= 1, "more than 0 and at most 1")
        self._check_number("min_p", lambda value: 0 <= value <= 1, "0 to 1")
        self._check_number("repetition_penalty", lambda value: value > 0, "more than 0 (1 does nothing)")
        self._check_number("presence_penalty", lambda value: True, "a number")
        self._check_number("frequency_penalty", lambda value: True, "a number")
        if self.min_new_tokens > self.max_new_tokens:
            raise GenerationError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; at most that many "
                "were expected"
            )
        if self.seed is not None:
            self._check_integer("seed", 0)
            if self.seed >= _SEEDS:
                raise GenerationError(f"seed is {self.seed}; 0 to 2^64 - 1 was expected")
        if self.logprobs is not None:
            self._check_integer("logprobs", 0)
            if self.logprobs > _MOST_LOGPROBS:
                raise GenerationError(f"logprobs is {self.logprobs}; 0 to {_MOST_LOGPROBS} was expected")
        if self.deadline is not None:
            self._check_number("deadline", lambda value: value > 0, "seconds, more than 0")
        self._check_biases()
        strings = (self.stop,) if isinstance(self.stop, str) else self._tuple("stop", "strings")
        if not all(isinstance(one, str) and one for one in strings):
            raise GenerationError(f"stop is {self.stop!r}; strings that are not empty were expected")
        object.__setattr__(self, "stop_strings", strings)
        ids = self._tuple("stop_token_ids", "token ids")
        if not all(_is_integer(token) for token in ids):
            raise GenerationError(f"stop_token_ids is {self.stop_token_ids!r}; token ids were expected")
        object.__setattr__(self, "stop_ids", frozenset(int(token) for token in ids))
        if self.num_draft_tokens is not None:
            self._check_integer("num_draft_tokens", 0)
        for name in ("ignore_eos", "continue_final_message", "parse_special"):
            if not isinstance(getattr(self, name), bool):
                raise GenerationError(f"{name} is {getattr(self, name)!r}; True or False was expected")
        _ = self.chat  # checks what it is made of
        if self.sampling not in SAMPLING:
            raise GenerationError(f"sampling is {self.sampling!r}; {' or '.join(map(repr, SAMPLING))} was expected")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise GenerationError(f"logits_processor is {self.logits_processor!r}; a function was expected")
        if self.cancel is not None and not hasattr(self.cancel, "is_set"):
            raise GenerationError(f"cancel is {self.cancel!r}; a threading.Event, or the like, was expected")
        if self.recorder is not None and not isinstance(self.recorder, Recorder):
            raise GenerationError(f"recorder is {self.recorder!r}; a runtime.Recorder was expected")
        for one in as_list(self.drafter):
            if not isinstance(one, str) and not hasattr(one, "propose"):
                raise GenerationError(f"drafter is {one!r}; a name, or an object with propose, was expected")

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
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise GenerationError(f"{name} names the token id {token}, outside the vocabulary of {vocab_size}")

    def _check_biases(self) -> None:
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise GenerationError(f"logit_bias is {self.logit_bias!r}; token ids with numbers were expected")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_integer(token) or not (bias == -math.inf or _is_float32(bias)):
                raise GenerationError(f"logit_bias has {token!r}: {bias!r}; token ids with numbers (or -inf) expected")

    def _tuple(self, name: str, expected: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        try:
            return () if value is None else tuple(value)
        except TypeError:
            raise GenerationError(f"{name} is {value!r}; {expected} were expected") from None

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < least:
            raise GenerationError(f"{name} is {value!r}; {least} or more was expected")

    def _check_number(self, name: str, fits: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        if not _is_float32(value) or not fits(float(value)):
            raise GenerationError(f"{name} is {value!r}; {expected} was expected")


OPTIONS = tuple(one for one in fields(GenerationOptions) if one.init)


def make_options(
    options: Mapping[str, Any], model_defaults: Mapping[str, float | int] | None = None
) -> GenerationOptions:
    """The options, checked; `model_defaults`: what `sampling="model"` stands for.

    Raises:
        GenerationError: an option that is unknown, or whose value cannot be honoured.
    """
    known = [one.name for one in OPTIONS]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise GenerationError(f"unknown option {name!r}{hint}")
    if options.get("sampling") == "model":
        if not model_defaults:
            raise GenerationError("sampling is 'model', and the engine's checkpoint has no sampling defaults")
        options = {**model_defaults, **options}
    return GenerationOptions(**options)


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_options(method: Method) -> Method:
    """Show the options one by one in the signature of a method that takes `**options`."""
    signature = inspect.signature(method)
    shown = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    for option in OPTIONS:
        default = inspect.Parameter.empty if option.default is MISSING else option.default
        shown.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option.type)
        )
    method.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return method


def _is_float32(value: Any) -> bool:
    """Whether it is a finite number that logits can take."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return abs(float(value)) <= _LARGEST_FLOAT32
    except OverflowError:
        return False


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
