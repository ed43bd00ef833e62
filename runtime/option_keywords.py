"""The options of a generation as keywords of the methods that generate."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

from quasar.errors import GenerationError
from runtime.drafters.named import DrafterOption
from runtime.generation_options import OPTIONS, GenerationOptions, LogitsProcessor, Signal
from runtime.grammar.formats import ResponseFormat
from runtime.traces import Recorder


class OptionsDict(TypedDict, total=False):
    """The options as keywords, for type checkers; `GenerationOptions` says what they mean.

    `options`: all of them at once; keywords given beside it take the place of its fields.
    """

    options: GenerationOptions | None
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
    response_format: ResponseFormat | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    logprobs: int | None
    deadline: float | None
    cancel: Signal | None
    drafter: DrafterOption
    prediction: str | Sequence[int] | None
    num_draft_tokens: int | None
    chat_template: bool | str
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool
    parse_special: bool
    date: str | None
    sampling: str
    priority: int
    cache_salt: str | None
    recorder: Recorder | None


def make_options(
    options: Mapping[str, Any], model_defaults: Mapping[str, float | int] | None = None
) -> GenerationOptions:
    """The options, checked.

    Args:
        options: keywords; one named `options` holds a `GenerationOptions`, of which the others replace fields.
        model_defaults: what `sampling="model"` stands for.

    Raises:
        GenerationError: an option that is unknown, or whose value cannot be honoured.
    """
    keywords = {name: value for name, value in options.items() if name != "options"}
    known = [one.name for one in OPTIONS]
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise GenerationError(f"unknown option {name!r}{hint}")
    base = options.get("options")
    if base is not None and not isinstance(base, GenerationOptions):
        raise GenerationError(f"options is {base!r}; a runtime.GenerationOptions was expected")
    if keywords.get("sampling", "own" if base is None else base.sampling) == "model":
        if not model_defaults:
            raise GenerationError("sampling is 'model', and the engine's checkpoint has no sampling defaults")
        defaults = {one.name: one.default for one in OPTIONS}
        for name, value in model_defaults.items():
            if base is None or getattr(base, name) == defaults[name]:
                keywords.setdefault(name, value)
    return GenerationOptions(**keywords) if base is None else replace(base, **keywords)


def cancel_of(options: OptionsDict) -> Signal | None:
    """The caller's own signal among keywords and `options=`."""
    base = options.get("options")
    return options.get("cancel", base.cancel if isinstance(base, GenerationOptions) else None)


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_options(method: Method) -> Method:
    """Show the options one by one in the signature of a method that takes `**options`."""
    signature = inspect.signature(method)
    shown = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shown.append(inspect.Parameter("options", keyword, default=None, annotation=GenerationOptions | None))
    shown += [inspect.Parameter(one.name, keyword, default=one.default, annotation=one.type) for one in OPTIONS]
    method.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return method
