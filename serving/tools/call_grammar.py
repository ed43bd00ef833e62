"""The grammar of answers that call functions, in the form of Lark: literal text around the schemas of the arguments."""

import json
from collections.abc import Mapping
from typing import Any

from runtime.grammar.compiler import WHITESPACE
from serving.tools.call_formats import CallFormat
from serving.tools.tool_fields import Tool, ToolUse

_NEW_LINE = json.dumps("\n")
_ANY_TEXT = r"TEXT: /(.|\n)*/"
# Without an opener, what begins with a brace is a call.
_NO_OBJECT = r"TEXT: /\s*[^{\s](.|\n)*/"


def needs_grammar(use: ToolUse) -> bool:
    """Whether what the request asks for can be had from a grammar alone."""
    return use.required or not use.parallel or any(tool.strict for tool in use.callable)


def call_grammar(use: ToolUse, form: CallFormat) -> str:
    """The grammar of answers that call these functions.

    Where a call is required, the answer is nothing but calls, whose arguments their schemas describe. Else text may
    stand before a call, and the schemas of strict functions alone hold: the arguments of others are any object.
    """
    rules = [
        _call(f"call{place}", tool, form, follows=use.required or tool.strict)
        for place, tool in enumerate(use.callable)
    ]
    begin = f"{_marker(form.opener, form)} {_NEW_LINE} " if form.opener else ""
    end = f" {_NEW_LINE} {_marker(form.closer, form)}" if form.opener else ""
    several = form.several and use.parallel
    choice = " | ".join(f"call{place}" for place in range(len(rules)))
    lines = [f"body: {choice}", *rules]
    if use.required:
        lines.append(f"call: {begin}body{end}")
        return "\n".join([f"start: call{_repeated(several)}", *lines])
    if not form.opener:
        return "\n".join(["start: (TEXT | body)?", *lines, _NO_OBJECT])
    # The text before a call ends with the opener, as soon as there is one.
    head = f"head[lazy]: TEXT {json.dumps(form.opener)}"
    lines += [f"call: head {_NEW_LINE} body{end}", head, "tail: TEXT"]
    return "\n".join(["start: call* tail" if several else "start: tail | call", *lines, _ANY_TEXT])


def _repeated(several: bool) -> str:
    # Models that end a call with a new line have nothing but another call to go on with, unless it may be the last.
    return f" ({_NEW_LINE} call)* {_NEW_LINE}?" if several else ""


def _marker(text: str, form: CallFormat) -> str:
    """An opener or a closer: its token, where there is one, since a model was not taught to spell it in pieces."""
    return f"<[{form.tokens[text]}]>" if text in form.tokens else json.dumps(text)


def _call(rule: str, tool: Tool, form: CallFormat, *, follows: bool) -> str:
    """The rule of one function's object; `follows`: its arguments follow their schema."""
    begin = f'{{"name": {json.dumps(tool.name)}, "{form.arguments[0]}": '
    schema = tool.schema if follows else {"type": "object"}
    return f'{rule}: {json.dumps(begin)} %json {json.dumps(_bounded(schema))} "}}"'


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the bounds that the runtime sets to spaces, unless it has its own."""
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **own} if isinstance(own, dict) else own}
