"""Fields that say what an answer looks like: OpenAI's `response_format`, and vLLM's earlier and present ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quasar.errors import GrammarError
from runtime.grammar.formats import ResponseFormat, read_format
from serving.api_errors import invalid
from serving.request_fields import Field, Read, array, json_object, short, string, wrong
from serving.request_limits import is_too_deep

MOST_CHOICES = 10_000
# What is longer is refused by the runtime, which knows its limits; this is more than a body can hold.
_LONGEST = 2**31
# Type of the runtime's format → where it holds what the client gave.
_INNER = {"json_schema": ".json_schema.schema", "regex": ".regex", "grammar": ".grammar"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """A format of the runtime, checked, and the field that it came from. `value` None: any text."""

    field: str
    value: ResponseFormat | None


def check_format(name: str, value: Any, *, inner: str = "") -> None:
    """Raise `ApiError` for a format that the runtime refuses; `inner`: the path that the field's value has in it."""
    try:
        read_format(name, value)
    except GrammarError as error:
        where, space, rest = str(error).partition(" ")
        place = f"{name}{where.removeprefix(name).removeprefix(inner)}"
        raise invalid(place, f"{place}{space}{rest}") from None


def _response_format(name: str, value: Any) -> AnswerFormat:
    kind = json_object(name, value).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong(f"{name}.type", kind, "'text', 'json_object' or 'json_schema'")
    check_format(name, value)
    return AnswerFormat(field=name, value=None if kind == "text" else value)


def _made(name: str, value: Any) -> AnswerFormat:
    check_format(name, value, inner=_INNER.get(value["type"], ""))
    return AnswerFormat(field=name, value=value)


def _json(name: str, value: Any) -> AnswerFormat:
    """A schema, or its text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid(name, f"{name} is text that is no JSON ({short(str(error))})") from None
    if not isinstance(schema, dict):
        raise wrong(name, value, "a JSON schema, an object,")
    if is_too_deep(schema):
        raise invalid(name, f"{name} is nested too deeply")
    return _made(name, {"type": "json_schema", "json_schema": {"schema": schema}})


def _regex(name: str, value: Any) -> AnswerFormat:
    return _made(name, {"type": "regex", "regex": string(_LONGEST)(name, value)})


def _grammar(name: str, value: Any) -> AnswerFormat:
    return _made(name, {"type": "grammar", "grammar": string(_LONGEST)(name, value)})


def _choice(name: str, value: Any) -> AnswerFormat:
    """One of several texts: a grammar of theirs."""
    texts = array(string(_LONGEST), MOST_CHOICES)(name, value)
    if not texts:
        raise wrong(name, value, "a list that is not empty")
    # A terminal, since a rule has at most 600 alternatives. A string of Lark is one of JSON; no text looks like a
    # directive.
    literals = (json.dumps(text).replace("%", "\\u0025") for text in dict.fromkeys(texts))
    return _made(name, {"type": "grammar", "grammar": f"start: CHOICE\nCHOICE: {' | '.join(literals)}"})


def _json_object(name: str, value: Any) -> AnswerFormat | None:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return _made(name, {"type": "json_object"}) if value else None


_KINDS: Mapping[str, Read] = {"json": _json, "regex": _regex, "grammar": _grammar, "choice": _choice}
_STRUCTURED: Mapping[str, Read] = {**_KINDS, "json_object": _json_object}


def _structured(name: str, value: Any) -> AnswerFormat:
    """Exactly one of vLLM's kinds."""
    found = []
    for key, item in json_object(name, value).items():
        if key not in _STRUCTURED:
            where = f"{name}.{short(key)}"
            raise invalid(where, f"{where} is not supported: one of {', '.join(_STRUCTURED)} was expected")
        if item is not None:
            found.append(_STRUCTURED[key](f"{name}.{key}", item))
    formats = [one for one in found if one is not None]
    if len(formats) != 1:
        raise invalid(name, f"{name} has {len(formats)} of {', '.join(_STRUCTURED)}; exactly one was expected")
    return AnswerFormat(field=formats[0].field, value=formats[0].value)


STRUCTURED_FIELDS = (
    Field(name="response_format", read=_response_format),
    *(Field(name=f"guided_{kind}", read=read) for kind, read in _KINDS.items()),
    Field(name="structured_outputs", read=_structured),
)


def answer_format(fields: Mapping[str, Any]) -> AnswerFormat | None:
    """The format that a request asks for; None: any text. Raises `ApiError` for more than one."""
    wanted = {one.name: fields[one.name] for one in STRUCTURED_FIELDS if one.name in fields}
    formats = {name: one for name, one in wanted.items() if one.value is not None}
    if len(formats) > 1:
        first, second = list(formats)[:2]
        raise invalid(second, f"{second} came with {first}: an answer has one format, give one of them")
    return next(iter(formats.values()), None)
