"""`POST /v1/chat/completions`: its fields, and the request that they make."""

import json
from typing import Any

from runtime.grammar.formats import ResponseFormat
from serving.api_errors import invalid
from serving.api_request import ApiRequest, ServedModel, make_request
from serving.chat_messages import characters_of, for_template, read_messages
from serving.predicted_output import read_prediction
from serving.request_fields import Field, boolean, integer, json_object, only, read_fields, string, table_of
from serving.sampling_fields import MOST_LOGPROBS, MOST_TOKENS, SAMPLING_FIELDS, sampling_options
from serving.structured_fields import AnswerFormat, answer_format, check_format
from serving.tools.call_grammar import call_grammar
from serving.tools.call_support import call_rules
from serving.tools.tool_fields import TOOL_FIELDS, tool_use

_OLD_TOOLS = "tools and tool_choice took its place"

CHAT_FIELDS = table_of(
    *SAMPLING_FIELDS,
    Field(name="messages", read=read_messages),
    Field(name="max_completion_tokens", read=integer(1, MOST_TOKENS)),
    Field(name="logprobs", read=boolean),
    Field(name="top_logprobs", read=integer(0, MOST_LOGPROBS)),
    Field(name="prompt_cache_key", read=string(512)),
    Field(name="safety_identifier", read=string(512)),
    Field(name="chat_template_kwargs", read=json_object, option="chat_template_kwargs"),
    Field(name="continue_final_message", read=boolean, option="continue_final_message"),
    Field(name="add_generation_prompt", read=boolean),
    *TOOL_FIELDS,
    Field(name="functions", read=only([], because=_OLD_TOOLS)),
    Field(name="function_call", read=only("none", because=_OLD_TOOLS)),
    Field(name="prediction", read=read_prediction, option="prediction"),
    Field(name="modalities", read=only(["text"], because="answers are text")),
    Field(name="audio", read=only(because="answers are text")),
    Field(name="store", read=only(False, because="nothing is stored")),
    Field(name="service_tier", read=only("auto", "default", because="there is one tier")),
    Field(name="reasoning_effort", read=only(because="chat_template_kwargs say what a template knows of it")),
    Field(name="verbosity", read=only(because="no template knows it")),
    Field(name="web_search_options", read=only(because="nothing is searched")),
    Field(name="moderation", read=only(because="nothing is moderated")),
    Field(name="prompt_cache_options", read=only(because="prompt_cache_key alone is read")),
    Field(name="prompt_cache_retention", read=only(because="prompt_cache_key alone is read")),
)


def read_chat_request(body: Any, model: ServedModel, *, key: str = "") -> ApiRequest:
    """The request that a JSON body makes; `key`: what tells its sender from others'.

    Raises `ApiError` naming the field that cannot be honoured.
    """
    fields = read_fields(body, CHAT_FIELDS)
    model.check_name(fields)
    model.check_tokens(fields)
    if "messages" not in fields:
        raise invalid("messages", "messages is missing; a list of messages was expected", "missing_required_parameter")
    messages = fields["messages"]
    use = tool_use(fields)
    shown = [] if use is None else [tool.for_template() for tool in use.shown]
    model.check_length("messages", characters_of(messages) + len(json.dumps(shown)))
    model.check_length("prediction", len(fields.get("prediction", "")), "prediction")
    options = sampling_options(_one_limit(fields), CHAT_FIELDS, {**model.defaults, "max_new_tokens": model.max_tokens})
    wanted, calls = answer_format(fields), None
    if use is not None:
        calls = call_rules(use, model.calls, model.no_calls, fields, wanted)
        options["tools"] = shown
        if calls.certain:
            grammar: ResponseFormat = {"type": "grammar", "grammar": call_grammar(use, calls.format)}
            check_format("tools", grammar, inner=".grammar")
            wanted = AnswerFormat(field="tools", value=grammar)
    _check_generation_prompt(fields)
    return make_request(
        fields,
        options,
        chat=True,
        # Messages were checked one by one.
        prompts=(for_template(messages, model.template),),  # type: ignore[arg-type]
        key=key,
        logprobs=_logprobs(fields),
        wanted=wanted,
        calls=calls,
    )


def _one_limit(fields: dict[str, Any]) -> dict[str, Any]:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    if "max_completion_tokens" not in fields:
        return fields
    limit = fields["max_completion_tokens"]
    if fields.get("max_tokens", limit) != limit:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
    return {**fields, "max_tokens": limit}


def _logprobs(fields: dict[str, Any]) -> int | None:
    if fields.get("logprobs", False):
        likeliest: int = fields.get("top_logprobs", 0)
        return likeliest
    if "top_logprobs" in fields:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: set it to true")
    return None


def _check_generation_prompt(fields: dict[str, Any]) -> None:
    """VLLM's clients say both; only one of the two makes sense with the other."""
    goes_on = fields.get("continue_final_message", False)
    if fields.get("add_generation_prompt", not goes_on) == goes_on:
        raise invalid(
            "add_generation_prompt",
            f"add_generation_prompt is {str(goes_on).lower()}; with continue_final_message {str(goes_on).lower()}, "
            f"{str(not goes_on).lower()} was expected",
        )
