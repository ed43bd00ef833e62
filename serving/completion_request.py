"""`POST /v1/completions`: its fields, and the request that they make."""

from typing import Any

from runtime.prompt_ids import Prompt
from serving.api_errors import invalid
from serving.api_request import ApiRequest, ServedModel, make_request
from serving.request_fields import Field, boolean, integer, only, read_fields, table_of, wrong
from serving.sampling_fields import MOST_CHOICES, MOST_LOGPROBS, SAMPLING_FIELDS, sampling_options
from serving.structured_fields import answer_format

# OpenAI's own default.
_MAX_TOKENS = 16


def _prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    """A string, token ids, or a list of either."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a string, token ids, or a list of these that is not empty")
    if _are_ids(value):
        return (value,)
    if len(value) > MOST_CHOICES:
        raise invalid(name, f"{name} holds {len(value)} prompts; at most {MOST_CHOICES} were expected")
    for place, one in enumerate(value):
        if not isinstance(one, str) and not (isinstance(one, list) and _are_ids(one)):
            raise wrong(f"{name}[{place}]", one, "a string, or token ids,")
    return tuple(value)


def _are_ids(value: list[Any]) -> bool:
    return all(type(one) is int and 0 <= one < 2**31 for one in value)


COMPLETION_FIELDS = table_of(
    *SAMPLING_FIELDS,
    Field(name="prompt", read=_prompts),
    Field(name="logprobs", read=integer(0, MOST_LOGPROBS)),
    Field(name="echo", read=boolean),
    Field(name="best_of", read=only(1, because="answers are not ranked")),
    Field(name="suffix", read=only("", because="text is written at the end alone")),
)


def read_completion_request(body: Any, model: ServedModel, *, key: str = "") -> ApiRequest:
    """The request that a JSON body makes; `key`: what tells its sender from others'.

    Raises `ApiError` naming the field that cannot be honoured.
    """
    fields = read_fields(body, COMPLETION_FIELDS)
    model.check_name(fields)
    model.check_tokens(fields)
    if "prompt" not in fields:
        raise invalid("prompt", "prompt is missing; text or token ids were expected", "missing_required_parameter")
    prompts: tuple[Prompt, ...] = fields["prompt"]
    for one in prompts:
        # Ids are as many tokens; the runtime says so in its own words.
        model.check_length("prompt", len(one) if isinstance(one, str) else 0)
    defaults = {**model.defaults, "chat_template": False, "max_new_tokens": min(_MAX_TOKENS, model.max_tokens)}
    return make_request(
        fields,
        sampling_options(fields, COMPLETION_FIELDS, defaults),
        chat=False,
        prompts=prompts,
        key=key,
        logprobs=fields.get("logprobs"),
        wanted=answer_format(fields),
        echo=_echo(fields, prompts),
    )


def _echo(fields: dict[str, Any], prompts: tuple[Prompt, ...]) -> tuple[str, ...]:
    if not fields.get("echo", False):
        return ()
    if "logprobs" in fields:
        raise invalid("echo", "echo with logprobs is not supported: those of a prompt are not computed")
    texts = tuple(one for one in prompts if isinstance(one, str))
    if len(texts) < len(prompts):
        raise invalid("echo", "echo is for prompts that are text; token ids came")
    return texts
