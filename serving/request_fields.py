"""How a field of a request is declared and read: a table of names, each with what checks its value."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.api_errors import invalid

# Given a field's path and its value, gives the value to go on with; raises `ApiError` for one that cannot be honoured.
Read = Callable[[str, Any], Any]
_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a request's JSON object. `option`: the runtime's option that it becomes; "" for none."""

    name: str
    read: Read
    option: str = ""


def table_of(*fields: Field) -> dict[str, Field]:
    """Fields by name."""
    return {one.name: one for one in fields}


def read_fields(body: Any, table: Mapping[str, Field]) -> dict[str, Any]:
    """Name → value of the fields that were given; null counts as not given. Unknown ones are errors."""
    if not isinstance(body, dict):
        raise invalid(None, f"the body is {kind_of(body)}; a JSON object was expected")
    found = {}
    for name, value in body.items():
        if name not in table:
            close = difflib.get_close_matches(name[:_SHOWN], table, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise invalid(short(name), f"unknown field {short(name)!r}{hint}", "unknown_parameter")
        if value is not None:
            found[name] = table[name].read(name, value)
    return found


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def integer(least: int, most: int) -> Read:
    """A whole number from `least` to `most`."""

    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}")
        return value

    return read


def number(least: float, most: float) -> Read:
    """A number from `least` to `most`."""

    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    return read


def string(most: int) -> Read:
    """A string of 1 to `most` characters."""

    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= most:
            raise wrong(name, value, f"a string of 1 to {most} characters")
        return value

    return read


def array(each: Read, most: int) -> Read:
    """A list of at most `most` values, each of which another check reads."""

    def read(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise wrong(name, value, f"a list of at most {most}")
        return [each(f"{name}[{place}]", item) for place, item in enumerate(value)]

    return read


def one_or_more(each: Read, most: int) -> Read:
    """A value, or a list of at most `most`; gives a list."""
    several = array(each, most)
    return lambda name, value: several(name, value) if isinstance(value, list) else [each(name, value)]


def biases(name: str, value: Any) -> dict[int, float]:
    """Token ids, as the strings that JSON's keys are, with numbers from -100 to 100; at most 1,024 of them."""
    if not isinstance(value, dict) or len(value) > 1024:
        raise wrong(name, value, "an object of at most 1024 token ids with numbers")
    check = number(-100, 100)
    found = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise invalid(name, f"{name} names the token {short(token)!r}; token ids were expected")
        found[int(token)] = check(f"{name}[{token!r}]", bias)
    return found


def json_object(name: str, value: Any) -> dict[str, Any]:
    """An object of any content."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def inner(table: Mapping[str, Field]) -> Read:
    """An object with fields of its own."""

    def read(name: str, value: Any) -> dict[str, Any]:
        json_object(name, value)
        for key in value:
            if key not in table:
                raise invalid(f"{name}.{short(key)}", f"unknown field {f'{name}.{short(key)}'!r}", "unknown_parameter")
        return {key: table[key].read(f"{name}.{key}", item) for key, item in value.items() if item is not None}

    return read


def only(*values: Any, because: str) -> Read:
    """A field of which nothing but these values can be honoured: those that ask for what is done anyway."""

    def read(name: str, value: Any) -> Any:
        # 1 and true are equal to Python.
        if not any(value == one and type(value) is type(one) for one in values):
            raise invalid(name, f"{name} is not supported: {because}", "unsupported_parameter")
        return value

    return read


def wrong(name: str, value: Any, expected: str) -> Exception:
    """The error for a value that is none of those expected."""
    shown = short(repr(value)) if isinstance(value, (str, bool, float)) or _is_small(value) else kind_of(value)
    return invalid(name, f"{name} is {shown}; {expected} was expected", "invalid_value")


def short(text: str) -> str:
    """The beginning of a text that a client sent."""
    text = text[: _SHOWN + 1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _is_small(value: Any) -> bool:
    # Python refuses to write down the longest integers.
    return isinstance(value, int) and abs(value) < 10**18
