"""Messages of a conversation, as people and programs send them, checked and brought to one form."""

import json
from collections.abc import Mapping
from typing import Any, TypedDict

from quasar.errors import PromptError

MESSAGES = 'messages are [{"role": "user", "content": "…"}]'


class Message(TypedDict, total=False):
    """One turn of a conversation; what else it has (name, tool_call_id, …) goes to the chat template as it is.

    `content` is None where `tool_calls` stand for it.
    """

    role: str
    content: str | None
    tool_calls: list[dict[str, Any]]


def check_messages(value: Any, where: str) -> tuple[Message, ...]:
    """A conversation as a tuple of messages.

    Content that is a list of text parts becomes their text, line by line; arguments of tool calls that are a JSON text
    become an object, which is what chat templates read. Raises `PromptError` naming what cannot be used.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise PromptError(f"{where}: messages must be a list that is not empty; {MESSAGES}")
    return tuple(_message(message, where) for message in value)


def content_of(message: Message) -> str:
    """The message's text; "" where tool calls stand for it."""
    return message.get("content") or ""


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise PromptError(f"{where}: a message needs the strings role and content, {str(value)[:80]!r} came")
    message = dict(value)
    for key, item in message.items():
        if not isinstance(key, str) or not _is_json(item):
            raise PromptError(f"{where}: a message's {key!r} is a {type(item).__name__}; what JSON holds was expected")
    if message.get("tool_calls") is None:
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    content = message.get("content")
    if content is None and "tool_calls" in message:
        message["content"] = None
    elif isinstance(content, list):
        message["content"] = _joined(content, where)
    elif not isinstance(content, str):
        raise PromptError(f"{where}: a message needs the strings role and content, {str(value)[:80]!r} came")
    # The keys were checked one by one.
    return message  # type: ignore[return-value]


def _joined(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise PromptError(f"{where}: a message has a content part {kind!r}; parts of type 'text' were expected")
    return "\n".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise PromptError(f"{where}: tool_calls is {str(value)[:80]!r}; a list of objects was expected")
    calls = []
    for call in value:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except ValueError:
                arguments = function["arguments"]
            call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return calls


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
