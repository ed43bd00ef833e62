"""What a request says of functions, without a server: fields, formats, grammars, templates."""

import json

import pytest

from quasar.text.chat_template import ChatOptions, ChatTemplate
from serving.api_errors import ApiError
from serving.api_request import ServedModel
from serving.chat_request import read_chat_request
from serving.tools.call_formats import CALL_FORMATS, HERMES, LLAMA3_JSON, format_of
from tests.serving.tools.templates import HERMES_TEMPLATE, LLAMA_TEMPLATE, NO_TOOLS_TEMPLATE

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


def chat(form=HERMES, max_length=512, **fields):
    model = ServedModel(name="m", defaults={}, template="", max_length=max_length, calls=form, no_calls="for a reason")
    return read_chat_request({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}, model)


def refused(**fields):
    with pytest.raises(ApiError) as raised:
        chat(**fields)
    assert raised.value.answer.status == 400
    return raised.value.answer.param


def test_arguments_of_a_call_that_are_nested_too_deeply():
    arguments = '{"a":' + "[" * 600 + "]" * 600 + "}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "hi"}]
    assert refused(messages=messages) == "messages[0].tool_calls[0].function.arguments"


def test_a_schema_may_hold_the_word_of_a_directive():
    described = {**PARAMETERS, "description": "a %json value"}
    asked = chat(tools=[tool(parameters=described)], tool_choice="required")
    assert "a %json value" in asked.options["response_format"]["grammar"]


def test_schemas_that_are_too_long_together():
    long = {"type": "object", "properties": {"x": {"enum": ["y" * 40_000]}}}
    tools = [tool(name, parameters=long, strict=True) for name in ("f", "g")]
    assert refused(tools=tools, tool_choice="required", max_length=100_000) == "tools"


def test_formats_of_templates():
    assert format_of(HERMES_TEMPLATE) is HERMES
    assert format_of(LLAMA_TEMPLATE) is LLAMA3_JSON
    assert format_of(NO_TOOLS_TEMPLATE) is None
    assert format_of("{{ tools }}<tool_call>\n<function=f>") is None
    assert list(CALL_FORMATS) == ["hermes", "llama3-json"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": {}}),
        ("tools", {"tools": [tool(f"f{place}") for place in range(129)]}),
        ("tools[0]", {"tools": ["f"]}),
        ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
        ("tools[0].type", {"tools": [{"function": {"name": "f"}}]}),
        ("tools[0].function", {"tools": [{"type": "function"}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
        ("tools[0].function.name", {"tools": [tool("a b")]}),
        ("tools[0].function.name", {"tools": [tool("x" * 65)]}),
        ("tools[1].function.name", {"tools": [tool(), tool()]}),
        ("tools[0].function.description", {"tools": [tool(description=3)]}),
        ("tools[0].function.parameters", {"tools": [tool(parameters=[])]}),
        ("tools[0].function.parameters.type", {"tools": [tool(parameters={"type": "string"})]}),
        ("tools[0].function.strict", {"tools": [tool(strict="yes")]}),
        ("tools[0].function.secret", {"tools": [tool(secret=1)]}),
        ("tools[0].function.parameters", {"tools": [tool(parameters={"a": {"multipleOf": 1000003}}, strict=True)]}),
        ("tool_choice", {"tool_choice": "auto"}),
        ("tool_choice", {"tools": [tool()], "tool_choice": "any"}),
        ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ("tool_choice.type", {"tools": [tool()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}),
        ("tool_choice.function.name", {"tools": [tool()], "tool_choice": {"type": "function", "function": {}}}),
        ("parallel_tool_calls", {"parallel_tool_calls": False}),
        ("parallel_tool_calls", {"tools": [tool()], "parallel_tool_calls": 1}),
        ("logprobs", {"tools": [tool()], "logprobs": True}),
        ("continue_final_message", {"tools": [tool()], "continue_final_message": True}),
        ("response_format", {"tools": [tool()], "response_format": {"type": "json_object"}}),
        ("structured_outputs.regex", {"tools": [tool()], "structured_outputs": {"regex": "a"}}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("function_call", {"function_call": "auto"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(param, fields):
    assert refused(**fields) == param


def test_an_engine_without_calls():
    with pytest.raises(ApiError, match="tools cannot be called: for a reason") as raised:
        chat(form=None, tools=[tool()])
    assert raised.value.answer.param == "tools"
    # Nothing is called then, and nothing is missing.
    assert chat(form=None, tools=[tool()], tool_choice="none").calls is None


def test_tools_reach_the_template_without_what_is_not_its_own():
    request = chat(tools=[tool("f", parameters=PARAMETERS, description="", strict=False), tool("g")])
    assert request.options["tools"] == [
        {"type": "function", "function": {"name": "f", "description": "", "parameters": PARAMETERS}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
    ]
    assert "response_format" not in request.options
    assert (request.calls.names, request.calls.certain) == ({"f", "g"}, False)
    none = chat(tools=[tool()], tool_choice="none")
    assert (none.calls, "tools" in none.options) == (None, False)
    assert chat(tools=[], tool_choice="none").calls is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"parallel_tool_calls": False},
        {"tools": [tool(), tool("g", strict=True)]},
    ],
    ids=str,
)
def test_what_a_grammar_makes_sure(fields):
    request = chat(**{"tools": [tool(), tool("g")], **fields})
    assert request.calls.certain
    assert request.options["response_format"]["type"] == "grammar"
    assert request.option_fields == {"response_format": "tools"}
    assert request.calls.names == ({"f"} if isinstance(fields.get("tool_choice"), dict) else {"f", "g"})


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Bonn"}'}}
TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


@pytest.mark.parametrize(
    ("source", "call"),
    [
        (HERMES_TEMPLATE, '<tool_call>\n{"name": "f", "arguments": {"city": "Bonn"}}\n</tool_call>'),
        (LLAMA_TEMPLATE, '{"name": "f", "parameters": {"city": "Bonn"}}'),
    ],
    ids=["hermes", "llama3-json"],
)
def test_conversations_with_calls_reach_the_template(source, call):
    from quasar.text.messages import check_messages

    request = chat(messages=TALK, tools=[tool("f", parameters=PARAMETERS)])
    text = ChatTemplate(source).render(
        check_messages(request.prompts[0], "prompt"), ChatOptions(tools=tuple(request.options["tools"]))
    )
    assert call in text
    assert text.index(json.dumps(PARAMETERS)) < text.index("Weather?") < text.index(call) < text.index("rain")


@pytest.mark.parametrize(
    ("param", "calls"),
    [
        ("messages[0].tool_calls", {}),
        ("messages[0].tool_calls[0]", ["f"]),
        ("messages[0].tool_calls[0].type", [{**CALL, "type": "custom"}]),
        ("messages[0].tool_calls[0].function", [{"id": "a", "type": "function"}]),
        ("messages[0].tool_calls[0].function.name", [{**CALL, "function": {"arguments": "{}"}}]),
        ("messages[0].tool_calls[0].function.arguments", [{**CALL, "function": {"name": "f", "arguments": "{"}}]),
        ("messages[0].tool_calls[0].function.arguments", [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]),
    ],
    ids=str,
)
def test_messages_whose_calls_are_none(param, calls):
    assert refused(messages=[{"role": "assistant", "tool_calls": calls}]) == param


def test_calls_without_arguments_and_lists_without_calls():
    messages = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"role": "assistant", "content": "hi", "tool_calls": []},
    ]
    first, second = chat(messages=messages).prompts[0]
    assert first["tool_calls"][0]["function"]["arguments"] == "{}"
    assert "tool_calls" not in second
