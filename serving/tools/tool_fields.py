"""The fields `tools`, `tool_choice` and `parallel_tool_calls`: what may be called, and what must be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.api_errors import invalid
from serving.request_fields import Field, boolean, inner, json_object, short, table_of, wrong

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that may be called.

    Attributes:
        place: in the request's list.
        parameters: the JSON schema of its arguments; None: it has none.
        strict: its arguments must follow the schema.
    """

    place: int
    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """What its arguments follow: an object in any case."""
        if self.parameters is None:
            return {**_NO_PARAMETERS, "additionalProperties": False}
        return {"type": "object", **self.parameters}

    def for_template(self) -> dict[str, Any]:
        """The function as chat templates read it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(_NO_PARAMETERS if self.parameters is None else self.parameters)
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What the answer may be. `required`: calls alone. `name`: of the one function; "" for any."""

    none: bool = False
    required: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Functions that an answer may call.

    Attributes:
        shown: to the model.
        callable: those of them that may be called.
        required: the answer is calls alone.
        parallel: it may hold several.
    """

    shown: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    required: bool
    parallel: bool


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise wrong(name, value, "1 to 64 letters, digits, underscores and dashes")
    return value


def _description(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def _parameters(name: str, value: Any) -> dict[str, Any]:
    schema: dict[str, Any] = json_object(name, value)
    if schema.get("type", "object") != "object":
        raise wrong(f"{name}.type", schema["type"], "'object'")
    return schema


def _type(name: str, value: Any) -> str:
    if value != "function":
        raise invalid(
            name,
            f"{name} is {short(repr(value))}, which is not supported: 'function' was expected",
            "unsupported_value",
        )
    return "function"


_FUNCTION = table_of(
    Field(name="name", read=_name),
    Field(name="description", read=_description),
    Field(name="parameters", read=_parameters),
    Field(name="strict", read=boolean),
)
_TOOL = table_of(Field(name="type", read=_type), Field(name="function", read=inner(_FUNCTION)))
_NAMED = table_of(Field(name="type", read=_type), Field(name="function", read=inner(table_of(_FUNCTION["name"]))))


def _required(name: str, found: Mapping[str, Any], key: str) -> Any:
    if key not in found:
        raise invalid(f"{name}.{key}", f"{name}.{key} is missing", "missing_required_parameter")
    return found[key]


def _typed(name: str, value: Any, table: Mapping[str, Field]) -> Mapping[str, Any]:
    """The fields of an object whose type is looked at first: those of other types have other fields."""
    _type(f"{name}.type", _required(name, json_object(name, value), "type"))
    found: Mapping[str, Any] = inner(table)(name, value)
    return found


def _tool(name: str, place: int, value: Any) -> Tool:
    found = _typed(name, value, _TOOL)
    function = _required(name, found, "function")
    _required(f"{name}.function", function, "name")
    return Tool(place=place, **function)


def read_tools(name: str, value: Any) -> tuple[Tool, ...]:
    """Functions, each with a name of its own."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise wrong(name, value, f"a list of at most {MOST_TOOLS} functions")
    tools = tuple(_tool(f"{name}[{place}]", place, one) for place, one in enumerate(value))
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            where = f"{name}[{tool.place}].function.name"
            raise invalid(where, f"{where} is {tool.name!r}, which another one has")
        seen.add(tool.name)
    return tools


def read_choice(name: str, value: Any) -> ToolChoice:
    """A word, or a function."""
    if value in ("none", "auto", "required"):
        return ToolChoice(none=value == "none", required=value == "required")
    if not isinstance(value, dict):
        raise wrong(name, value, "'none', 'auto', 'required', or an object that names a function")
    found = _typed(name, value, _NAMED)
    return ToolChoice(required=True, name=_required(f"{name}.function", _required(name, found, "function"), "name"))


TOOL_FIELDS = (
    Field(name="tools", read=read_tools),
    Field(name="tool_choice", read=read_choice),
    Field(name="parallel_tool_calls", read=boolean),
)


def tool_use(fields: Mapping[str, Any]) -> ToolUse | None:
    """What a request says of functions; None where nothing may be called.

    Raises `ApiError` for a choice without functions, or of one that is not there.
    """
    tools: tuple[Tool, ...] = fields.get("tools", ())
    choice: ToolChoice = fields.get("tool_choice", ToolChoice())
    if not tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in fields and not (name == "tool_choice" and choice.none):
                raise invalid(name, f"{name} is for requests with tools: leave it out, or give tools")
    if not tools or choice.none:
        return None
    named = tuple(tool for tool in tools if choice.name in ("", tool.name))
    if not named:
        raise invalid("tool_choice", f"tool_choice names {choice.name!r}, which is none of the tools")
    return ToolUse(
        shown=tools,
        callable=named,
        required=choice.required,
        # A function that is chosen by name is called once.
        parallel=fields.get("parallel_tool_calls", True) and not choice.name,
    )
