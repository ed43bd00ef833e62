"""Calls in answers: which text is one, and that the cuts of a stream change nothing."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tools.call_formats import HERMES, LLAMA3_JSON
from serving.tools.call_parser import Call, CallParser, CallPiece, CallRules, ParsedAnswer, TextPiece, parse_answer
from serving.tools.object_scanner import ObjectScanner

NAMES = frozenset({"get_weather", "f"})
FORMATS = {one.name: one for one in (HERMES, LLAMA3_JSON)}


def parse(text, form="hermes", *, certain=False):
    return parse_answer(text, CallRules(format=FORMATS[form], names=NAMES, certain=certain))


def answer(text, *calls, whole=True):
    return ParsedAnswer(text=text, calls=tuple(Call(name=name, arguments=given) for name, given in calls), whole=whole)


CITY = '{"city": "Paris", "n": [1, -2.5e3, {"a": null}], "é": "\\u00e9\\"}</tool_call>"}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>'
LLAMA_CALL = f'{{"name": "get_weather", "parameters": {CITY}}}'


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("hermes", "", answer("")),
        ("hermes", " Hello <b>\n", answer(" Hello <b>\n")),
        ("hermes", HERMES_CALL, answer("", ("get_weather", CITY))),
        ("hermes", f"I look.\n\n{HERMES_CALL}\n", answer("I look.", ("get_weather", CITY))),
        ("hermes", f"{HERMES_CALL}\n{HERMES_CALL}", answer("", ("get_weather", CITY), ("get_weather", CITY))),
        ("hermes", f"a {HERMES_CALL} b {HERMES_CALL} c ", answer("a b c", *[("get_weather", CITY)] * 2)),
        ("hermes", f"{HERMES_CALL} so 1 <", answer("so 1 <", ("get_weather", CITY))),
        ("hermes", '<tool_call>{"arguments":{},"x":[],"name":"f"}', answer("", ("f", "{}"))),
        ("hermes", '<tool_call>{"name":"\\u0066","arguments":{}}</tool_ca', answer("", ("f", "{}"))),
        (
            "hermes",
            '<tool_call>\n{"name": "g", "arguments": {}}',
            answer('<tool_call>\n{"name": "g", "arguments": {}}'),
        ),
        ("hermes", '<tool_call>{"name":"f"}</tool_call>', answer('<tool_call>{"name":"f"}</tool_call>')),
        ("hermes", '<tool_call>{"name":"f","arguments":"{}"}', answer('<tool_call>{"name":"f","arguments":"{}"}')),
        ("hermes", '<tool_call>{"name":["f"],"arguments":{}}', answer('<tool_call>{"name":["f"],"arguments":{}}')),
        ("hermes", "a <tool_call>no", answer("a <tool_call>no")),
        ("hermes", f"a <tool_call>{{\n {HERMES_CALL}", answer("a <tool_call>{", ("get_weather", CITY))),
        ("hermes", "a <tool_cal", answer("a <tool_cal")),
        ("llama3-json", LLAMA_CALL, answer("", ("get_weather", CITY))),
        ("llama3-json", f" <|python_tag|> {LLAMA_CALL}\n", answer("", ("get_weather", CITY))),
        ("llama3-json", f"{LLAMA_CALL}; {LLAMA_CALL}", answer("", *[("get_weather", CITY)] * 2)),
        ("llama3-json", '{"name": "f", "arguments": {}} so', answer("so", ("f", "{}"))),
        ("llama3-json", f"See: {LLAMA_CALL}", answer(f"See: {LLAMA_CALL}")),
        ("llama3-json", '{"name": "Ada", "parameters": {}}', answer('{"name": "Ada", "parameters": {}}')),
        ("llama3-json", ' {"a": 1}', answer(' {"a": 1}')),
        ("llama3-json", "<|python", answer("<|python")),
        ("llama3-json", "\n<|python_tag|>x", answer("\n<|python_tag|>x")),
    ],
)
def test_answers(form, text, expected, certain):
    assert parse(text, form, certain=certain) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": }',
        '{"a": 01}',
        '{"a": "\n"}',
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": tru}',
        '{"a": 1',
        '{"a": "\\x"}',
        '{"a" 1}',
    ],
)
def test_a_malformed_call_stays_text(arguments):
    text = f'so\n<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert parse(text) == answer(text)


def test_a_call_that_a_grammar_makes_is_given_as_it_comes():
    parser = CallParser(CallRules(format=HERMES, names=NAMES, certain=True))
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push("{") == [CallPiece(index=0, name="f"), CallPiece(index=0, arguments="{")]
    assert parser.push('"a": 1') == [CallPiece(index=0, arguments='"a": 1')]
    assert not parser.finish()
    assert (parser.calls, parser.whole) == (1, False)
    # A grammar alone makes that sure: else half a call is text.
    cut = '<tool_call>\n{"name": "f", "arguments": {"a": 1'
    assert parse(cut) == answer(cut)


def test_what_may_begin_a_call_is_withheld():
    parser = CallParser(CallRules(format=HERMES, names=NAMES))
    assert parser.push("so \n<tool") == [TextPiece("so")]
    assert parser.push("s>") == [TextPiece(" \n<tools>")]
    parser = CallParser(CallRules(format=LLAMA3_JSON, names=NAMES))
    assert parser.push(' {"name": ') == []
    assert parser.push("!") == [TextPiece(" "), TextPiece('{"name": !')]
    assert parser.push("!") == [TextPiece("!")]


PARTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "\n",
            " ",
            "so",
            "{",
            "}",
            ";",
            "<|python_tag|>",
            '"',
            "\\",
            "[1",
            "]",
        ),
        *('{"name": "f", ', '"arguments": {}}', '"parameters": {"a": [1, "x"]}}', '"arguments": {"b": -1.5e', "é"),
        *(HERMES_CALL, LLAMA_CALL, CITY),
    ]
)


@given(
    st.lists(PARTS, max_size=12).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(list(FORMATS)),
    st.booleans(),
)
def test_cuts_change_nothing(text, cuts, form, certain):
    parser = CallParser(CallRules(format=FORMATS[form], names=NAMES, certain=certain))
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [piece for begin, end in itertools.pairwise(places) for piece in parser.push(text[begin:end])]
    pieces += parser.finish()
    texts = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
    names = [piece.name for piece in calls if piece.name is not None]
    arguments = [
        "".join(one.arguments for one in calls if one.index == index and one.name is None)
        for index in range(len(names))
    ]
    whole = parse(text, form, certain=certain)
    assert (texts, names, arguments) == (
        whole.text,
        [one.name for one in whole.calls],
        [one.arguments for one in whole.calls],
    )
    assert (parser.calls, parser.whole) == (len(whole.calls), whole.whole)
    for call in whole.calls if whole.whole else ():
        assert isinstance(json.loads(call.arguments), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_a_scanner_finds_the_values_of_an_object(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    scanner = ObjectScanner()
    scanner.read(f" {text}x")
    assert (scanner.complete, scanner.broken, scanner.position) == (True, False, len(text) + 1)
    assert {key: json.loads(f" {text}"[begin:end]) for key, (begin, end) in scanner.values.items()} == value


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3).map(json.dumps), st.data())
def test_a_scanner_takes_what_json_takes(text, data):
    place = data.draw(st.integers(0, len(text) - 1))
    text = text[:place] + data.draw(st.sampled_from('"{}[],:0e.-t \\\n')) + text[place + 1 :]
    scanner = ObjectScanner()
    scanner.read(text)
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    assert (scanner.complete and not text[scanner.position :].strip()) == isinstance(found, dict)
