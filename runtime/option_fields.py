"""How an option of a generation is declared: its default, what it means, what it may be, and how it is typed."""

import functools
import json
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quasar.errors import GenerationError

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

# Given an option's name and value, raises `GenerationError` for a value that cannot be honoured.
Check = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Flag:
    """An option on command lines.

    kind: the type that the command line reads. name: "" makes one of the option's name. default: None stands for the
    option's own. read: from what was typed to the option's value. continues: a regular expression; values that match
    it go on with a list, as in `--stop-token-ids 3 4`. rank: --help shows lower ones first.
    """

    kind: Any
    metavar: str | None = None
    help: str | None = None
    _: KW_ONLY
    name: str = ""
    default: Any = None
    read: Callable[[Any], Any] = lambda value: value
    continues: str = ""
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionMetadata:
    """What a field of `GenerationOptions` carries besides its type and default; `flag` None: not on command lines."""

    doc: str
    check: Check
    flag: Flag | None


def option(default: Any, doc: str, check: Check, flag: Flag | None = None) -> Any:
    """A field of `GenerationOptions`; the class's docstring and the command lines are made from it."""
    return field(default=default, metadata={"option": OptionMetadata(doc=doc, check=check, flag=flag)})


def metadata_of(declared: Field[Any]) -> OptionMetadata:
    """What `option` was given."""
    metadata: OptionMetadata = declared.metadata["option"]
    return metadata


def describe(declared: Iterable[Field[Any]]) -> str:
    """The part of a docstring that says what each option means."""
    wrap = functools.partial(textwrap.fill, width=120, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return "".join(f"{wrap(f'{one.name}: {metadata_of(one).doc}')}\n" for one in declared)


def anything(name: str, value: Any) -> None:
    """No check by itself: the value is checked together with others."""


def must(fits: Callable[[Any], bool], expected: str) -> Check:
    """A condition; `expected` ends the error, as in "a function was expected"."""

    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise GenerationError(f"{name} is {value!r}; {expected}")

    return check


def integer(least: int, most: int | None = None, span: str = "") -> Check:
    """An integer from `least` to `most`; `span`: the two in words."""

    def check(name: str, value: Any) -> None:
        if not is_integer(value) or value < least:
            raise GenerationError(f"{name} is {value!r}; {least} or more was expected")
        if most is not None and value > most:
            raise GenerationError(f"{name} is {value}; {span} was expected")

    return check


def number(fits: Callable[[float], bool], expected: str) -> Check:
    """A finite number that float32 can hold, and that fits."""
    return must(lambda value: is_float32(value) and fits(float(value)), f"{expected} was expected")


def or_none(check: Check) -> Check:
    """None, or what another check lets through."""
    return lambda name, value: None if value is None else check(name, value)


boolean = must(lambda value: isinstance(value, bool), "True or False was expected")


def check_biases(name: str, value: Any) -> None:
    """None, or token ids with finite numbers or -inf."""
    if value is not None and not isinstance(value, Mapping):
        raise GenerationError(f"{name} is {value!r}; token ids with numbers were expected")
    for token, bias in (value or {}).items():
        if not is_integer(token) or not (bias == -math.inf or is_float32(bias)):
            raise GenerationError(f"{name} has {token!r}: {bias!r}; token ids with numbers (or -inf) expected")


def as_tuple(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """The elements of a value, none for None; raises `GenerationError` if it has no elements."""
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise GenerationError(f"{name} is {value!r}; {expected} were expected") from None


def is_float32(value: Any) -> bool:
    """Whether it is a finite number that logits can take."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return abs(float(value)) <= _LARGEST_FLOAT32
    except OverflowError:
        return False


def is_integer(value: Any) -> bool:
    """Whether it is an integer, numpy's included."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def read_list(values: Sequence[Any] | None) -> tuple[Any, ...]:
    """The values of an option that may be given several times."""
    return tuple(values or ())


def read_text_file(path: Path | None) -> str | None:
    """A file's text; raises `GenerationError` if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GenerationError(f"{path} cannot be read ({error}); a text in UTF-8 was expected") from None


def read_arguments(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """`KEY=VALUE` pairs whose values are JSON or text; raises `GenerationError` for one that is no pair."""
    return dict(_argument(text) for text in texts or ()) or None


def read_biases(texts: Sequence[str] | None) -> dict[int, float] | None:
    """`ID=NUMBER` pairs; raises `GenerationError` for one that is no pair."""
    return dict(_bias(text) for text in texts or ()) or None


def _argument(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise GenerationError(f"--template-arg {text}: KEY=VALUE was expected, as in enable_thinking=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise GenerationError(f"--logit-bias {text}: ID=NUMBER was expected, as in 17=-2.5 or 17=-inf") from None
