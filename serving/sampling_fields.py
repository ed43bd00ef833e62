"""The fields that chat completions and completions share: OpenAI's, and vLLM's where OpenAI has none."""

from collections.abc import Mapping
from typing import Any

from runtime.drafters.named import names_alone
from runtime.scheduler import FIRST_OF_ALL
from serving.api_errors import invalid
from serving.request_fields import (
    Field,
    array,
    biases,
    boolean,
    inner,
    integer,
    number,
    one_or_more,
    only,
    string,
    table_of,
    wrong,
)
from serving.structured_fields import STRUCTURED_FIELDS

# What one request may hold; docs/serving.md has a table.
MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_STOP_IDS, MOST_LOGPROBS, MOST_TOKENS = 128, 16, 128, 128, 20, 2**31 - 1

_STREAM_OPTIONS = table_of(
    Field(name="include_usage", read=boolean),
    Field(name="include_obfuscation", read=only(False, because="chunks are sent as they are")),
)


def _seed(name: str, value: Any) -> int:
    """OpenAI's seeds may be negative: those count from 2^64 down."""
    seed: int = integer(-(2**63), 2**64 - 1)(name, value)
    return seed % 2**64


def _temperature(name: str, value: Any) -> float:
    found: float = number(0, 100)(name, value)
    if 0 < found < 1e-6:
        raise wrong(name, value, "0, or a number from 1e-06 to 100")
    return found


def _above_zero(name: str, value: Any, most: float) -> float:
    found: float = number(0, most)(name, value)
    if found < 1e-6:
        raise wrong(name, value, f"a number above 0, up to {most:g}")
    return found


def _drafter(name: str, value: Any) -> str:
    """One name or several with commas between them; none that opens a directory of the server's."""
    asked: str = string(256)(name, value)
    known = names_alone()
    if any(part.strip() not in known for part in asked.split(",")):
        raise wrong(name, value, f"one or more of {', '.join(known)}")
    return asked


SAMPLING_FIELDS = (
    Field(name="model", read=string(256)),
    Field(name="stream", read=boolean),
    Field(name="stream_options", read=inner(_STREAM_OPTIONS)),
    Field(name="n", read=integer(1, MOST_CHOICES)),
    Field(name="max_tokens", read=integer(1, MOST_TOKENS), option="max_new_tokens"),
    Field(name="min_tokens", read=integer(0, MOST_TOKENS), option="min_new_tokens"),
    Field(name="temperature", read=_temperature, option="temperature"),
    Field(name="top_p", read=lambda name, value: _above_zero(name, value, 1), option="top_p"),
    Field(name="top_k", read=integer(-1, MOST_TOKENS), option="top_k"),
    Field(name="min_p", read=number(0, 1), option="min_p"),
    Field(name="presence_penalty", read=number(-2, 2), option="presence_penalty"),
    Field(name="frequency_penalty", read=number(-2, 2), option="frequency_penalty"),
    Field(
        name="repetition_penalty", read=lambda name, value: _above_zero(name, value, 100), option="repetition_penalty"
    ),
    Field(name="logit_bias", read=biases, option="logit_bias"),
    Field(name="seed", read=_seed, option="seed"),
    Field(name="stop", read=one_or_more(string(LONGEST_STOP), MOST_STOPS), option="stop"),
    Field(name="stop_token_ids", read=array(integer(0, MOST_TOKENS), MOST_STOP_IDS), option="stop_token_ids"),
    Field(name="ignore_eos", read=boolean, option="ignore_eos"),
    Field(name="priority", read=integer(FIRST_OF_ALL + 1, MOST_TOKENS), option="priority"),
    Field(name="user", read=string(512)),
    Field(name="cache_salt", read=string(512)),
    Field(name="return_token_ids", read=boolean),
    Field(name="return_rounds", read=boolean),
    Field(name="drafter", read=_drafter, option="drafter"),
    *STRUCTURED_FIELDS,
    # What cannot be honoured is refused with a reason; one line makes an option of a field.
    Field(name="metadata", read=only({}, because="nothing is stored")),
)


def sampling_options(
    fields: Mapping[str, Any], table: Mapping[str, Field], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Options of `Engine.stream` from fields that were read; `defaults` stand for what was not given."""
    given = {table[name].option: value for name, value in fields.items() if table[name].option}
    if given.get("top_k") == -1:
        # vLLM's word for all of them.
        given["top_k"] = 0
    options = {**defaults, **given}
    if options.get("min_new_tokens", 0) > options["max_new_tokens"]:
        raise invalid("min_tokens", f"min_tokens is {options['min_new_tokens']}; at most max_tokens was expected")
    return options


def options_to_fields(table: Mapping[str, Field]) -> dict[str, str]:
    """Option of the runtime → the field that it comes from."""
    return {one.option: one.name for one in table.values() if one.option}
