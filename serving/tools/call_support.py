"""Whether an engine's answers can call functions, and how those of a request are read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quasar.text import TextCodec
from serving.api_errors import invalid
from serving.structured_fields import AnswerFormat, check_format
from serving.tools.call_formats import CALL_FORMATS, CallFormat, format_of, reads_tools
from serving.tools.call_grammar import needs_grammar
from serving.tools.call_parser import CallRules
from serving.tools.tool_fields import ToolUse


def calls_of(codec: TextCodec, chosen: str) -> tuple[CallFormat | None, str]:
    """The format of an engine's calls, or None and the reason why there is none. `chosen`: its name; "" finds it."""
    if codec.chat_template is None:
        return None, "this engine has no chat template"
    source = codec.chat_template.tool_source
    if not reads_tools(source):
        return None, "this engine's chat template does not read them"
    form = CALL_FORMATS[chosen] if chosen else format_of(source)
    if form is None:
        names = " or ".join(CALL_FORMATS)
        return None, f"this engine's chat template writes calls in a form that is not known ({names}: --tool-format)"
    found = {text: codec.tokenizer.token_to_id(text) for text in (form.opener, form.closer) if form.opener}
    tokens = {text: token for text, token in found.items() if token is not None}
    for text, token in tokens.items():
        if not codec.detokenizer.is_shown(token):
            return None, f"this engine's {text} is a special token, which no text shows"
    return replace(form, tokens=tokens), ""


def call_rules(
    use: ToolUse, form: CallFormat | None, no_calls: str, fields: Mapping[str, Any], wanted: AnswerFormat | None
) -> CallRules:
    """How the calls of a request's answers are read.

    Raises `ApiError` for functions that cannot be called here, and for fields that have no meaning beside them.
    """
    if form is None:
        raise invalid("tools", f"tools cannot be called: {no_calls}", "unsupported_parameter")
    if wanted is not None:
        raise invalid(
            wanted.field,
            f"{wanted.field} with tools is not supported, since an answer is one or the other: leave one out, or set "
            "tool_choice to 'none'",
        )
    for name in ("logprobs", "continue_final_message"):
        if fields.get(name, False):
            raise invalid(name, f"{name} with tools is not supported: leave it out, or set tool_choice to 'none'")
    certain = needs_grammar(use)
    for tool in use.callable if certain else ():
        if use.required or tool.strict:
            where = f"tools[{tool.place}].function.parameters"
            check_format(
                where,
                {"type": "json_schema", "json_schema": {"schema": tool.schema}},
                inner=".json_schema.schema",
            )
    return CallRules(format=form, names=frozenset(tool.name for tool in use.callable), certain=certain)
