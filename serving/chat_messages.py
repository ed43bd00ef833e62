"""Messages of a chat completion, as OpenAI's clients send them, in the form that the runtime takes."""

import json
import re
from typing import Any

from serving.api_errors import invalid
from serving.request_fields import kind_of, short, wrong
from serving.request_limits import is_too_deep

MOST_MESSAGES, MOST_PARTS, MOST_CALLS = 4096, 1024, 1024
_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Messages whose content is text. What else a message has is for the chat template; null counts as not there."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong(name, value, f"a list of 1 to {MOST_MESSAGES} messages")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def for_template(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages with roles that the template knows: a developer is the system where it does not name one."""
    if re.search(r"\bdeveloper\b", template):
        return messages
    return [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]


def characters_of(messages: list[dict[str, Any]]) -> int:
    """How long the messages are."""
    calls = (call["function"]["arguments"] for one in messages for call in one.get("tool_calls", ()))
    return sum(len(one["content"] or "") for one in messages) + sum(map(len, calls))


def _message(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object with role and content")
    role = value.get("role")
    if role not in _ROLES:
        raise wrong(f"{name}.role", role, f"one of {', '.join(_ROLES)}")
    message = {key: item for key, item in value.items() if item is not None}
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    elif "tool_calls" in message:
        message["tool_calls"] = _tool_calls(f"{name}.tool_calls", message["tool_calls"])
    if "content" in message:
        message["content"] = read_text(f"{name}.content", message["content"])
    elif "tool_calls" in message:
        message["content"] = None
    else:
        raise invalid(f"{name}.content", f"{name}.content is missing; a string was expected")
    return message


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Calls that an answer made, as it gave them."""
    if not isinstance(value, list) or len(value) > MOST_CALLS:
        raise wrong(name, value, f"a list of at most {MOST_CALLS} calls")
    return [_tool_call(f"{name}[{place}]", call) for place, call in enumerate(value)]


def _tool_call(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object of type function")
    if value.get("type", "function") != "function":
        raise wrong(f"{name}.type", value["type"], "'function'")
    function = value.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{name}.function", function, "an object with name and arguments")
    if not isinstance(function.get("name"), str):
        raise wrong(f"{name}.function.name", function.get("name"), "a string")
    # No arguments are an empty text with some clients.
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str) or not _is_object(arguments):
        raise invalid(
            f"{name}.function.arguments", f"{name}.function.arguments is no JSON text of an object", "invalid_value"
        )
    return {**value, "function": {**function, "arguments": arguments}}


def _is_object(text: str) -> bool:
    try:
        value = json.loads(text)
        return isinstance(value, dict) and not is_too_deep(value)
    except (ValueError, RecursionError):
        return False


def read_text(name: str, value: Any) -> str:
    """A string, or text parts, which are joined line by line."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MOST_PARTS:
        raise wrong(name, value, f"a string, or a list of at most {MOST_PARTS} text parts")
    return "\n".join(_part(f"{name}[{place}]", part) for place, part in enumerate(value))


def _part(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object of type text")
    kind = value.get("type")
    if kind != "text":
        shown = repr(short(kind)) if isinstance(kind, str) else kind_of(kind)
        raise invalid(
            f"{name}.type", f"{name}.type is {shown}, which is not supported: parts of type 'text' were expected"
        )
    for key in value:
        if key not in ("type", "text"):
            raise invalid(f"{name}.{short(key)}", f"unknown field {f'{name}.{short(key)}'!r}", "unknown_parameter")
    text = value.get("text")
    if not isinstance(text, str):
        raise wrong(f"{name}.text", text, "a string")
    return text
