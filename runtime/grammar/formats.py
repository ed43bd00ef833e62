"""What an answer may be asked to look like, and the text of the grammar that says so.

The forms of `json_object` and `json_schema` are those of OpenAI's API.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from quasar.errors import GrammarError

# Bytes of a schema, an expression or a grammar.
MOST_BYTES = 64 * 1024
# A number that must divide so many others takes as many states of an automaton as it is large: 10,000 take 40 ms, a
# million more than ten seconds. Where several must divide, their least common multiple counts.
_MOST_MULTIPLE = 10_000

GrammarKind: TypeAlias = Literal["json_schema", "regex", "lark"]


class TextFormat(TypedDict):
    """Any text: no grammar."""

    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(TypedDict):
    """A JSON schema with a name. The answer follows the schema whatever `strict` says."""

    name: NotRequired[str]
    description: NotRequired[str | None]
    schema: Mapping[str, Any]
    strict: NotRequired[bool | None]


class JsonSchemaFormat(TypedDict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(TypedDict):
    """What a regular expression matches as a whole: Rust's syntax, without look-around and back references."""

    type: Literal["regex"]
    regex: str


class GrammarFormat(TypedDict):
    """What a context-free grammar generates: the form of Lark, as llguidance has it."""

    type: Literal["grammar"]
    grammar: str


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat

# Type → keys besides it.
_KEYS: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex": ("regex",),
    "grammar": ("grammar",),
}
_SCHEMA_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "description": (str, type(None)),
    "schema": (Mapping,),
    "strict": (bool, type(None)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer follows: `text` is a JSON schema, a regular expression, or a grammar in the form of Lark."""

    kind: GrammarKind
    text: str


def read_format(name: str, value: Any) -> Grammar | None:
    """The grammar of a `ResponseFormat`, None for any text.

    Raises `GrammarError` with the option's `name` for a value that has another form, or is too large.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str) or value["type"] not in _KEYS:
        came = value.get("type", value) if isinstance(value, Mapping) else value
        raise GrammarError(f"{name} has the type {_short(came)}; one of {', '.join(_KEYS)} was expected, as a dict")
    kind, keys = value["type"], _KEYS[value["type"]]
    for key in value:
        if key not in ("type", *keys):
            expected = f"{keys[0]!r} beside the type" if keys else "the type alone"
            raise GrammarError(f"{name} of type {kind!r} has the key {_short(key)}; {expected} was expected")
    for key in keys:
        if key not in value:
            raise GrammarError(f"{name} of type {kind!r} lacks {key!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind="json_schema", text='{"type": "object"}')
    if kind == "json_schema":
        return Grammar(kind="json_schema", text=_schema_text(f"{name}.json_schema", value["json_schema"]))
    text = value[kind]
    if not isinstance(text, str) or not text:
        raise GrammarError(f"{name}.{kind} is {_short(text)}; text that is not empty was expected")
    _checked(f"{name}.{kind}", text)
    if kind == "grammar":
        for schema in _inner_schemas(f"{name}.{kind}", text):
            _check_multiples(f"{name}.{kind}", schema)
    return Grammar(kind="regex" if kind == "regex" else "lark", text=text)


def read_schema_file(path: Path | None) -> JsonSchemaFormat | None:
    """The format of a file that holds a JSON schema; raises `GrammarError` if it cannot be read."""
    if path is None:
        return None
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise GrammarError(f"{path} cannot be read as JSON ({error}); a JSON schema was expected") from None
    if not isinstance(schema, dict):
        raise GrammarError(f"{path} holds a {type(schema).__name__}; a JSON schema, an object, was expected")
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _schema_text(name: str, value: Any) -> str:
    if not isinstance(value, Mapping) or "schema" not in value:
        raise GrammarError(f"{name} is {_short(value)}; a dict with 'schema' was expected")
    for key, item in value.items():
        if key not in _SCHEMA_KEYS:
            raise GrammarError(f"{name} has the key {_short(key)}; known are {', '.join(_SCHEMA_KEYS)}")
        if not isinstance(item, _SCHEMA_KEYS[key]):
            raise GrammarError(f"{name}.{key} is {_short(item)}; {_SCHEMA_KEYS[key][0].__name__.lower()} was expected")
    try:
        # The order of the keys is that of the answer.
        text = json.dumps(value["schema"], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"{name}.schema is no JSON ({error})") from None
    _checked(f"{name}.schema", text)
    _check_multiples(f"{name}.schema", value["schema"])
    return text


def _checked(name: str, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(f"{name} is not Unicode text ({error.reason} at character {error.start})") from None
    if size > MOST_BYTES:
        raise GrammarError(f"{name} has {size} bytes; at most {MOST_BYTES} were expected")
    return text


def _check_multiples(name: str, schema: Any) -> None:
    common = 1
    for value in _multiples(schema):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            digits = Decimal(repr(value)).normalize().as_tuple().digits
            common = math.lcm(common, int("".join(map(str, digits))))
            if common > _MOST_MULTIPLE:
                raise GrammarError(
                    f"{name} has multipleOf values whose digits have the least common multiple {common}; at most "
                    f"{_MOST_MULTIPLE} was expected"
                )


def _inner_schemas(name: str, text: str) -> Iterator[Any]:
    """The JSON schemas inside of a grammar."""
    directive, place = re.compile(r"%json\s*"), 0
    while found := directive.search(text, place):
        try:
            # What stands in a schema is no directive.
            schema, place = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"{name} has a %json without a JSON schema after it ({error})") from None
        yield schema


def _multiples(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if "multipleOf" in value:
            yield value["multipleOf"]
        for item in value.values():
            yield from _multiples(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _multiples(item)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
