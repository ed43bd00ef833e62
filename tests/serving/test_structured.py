"""Answers in a format that the request asks for: the fields, what is refused, and that others do not wait."""

import json
import re
import threading
import time

import openai
import pytest
from jsonschema import validate

from serving.structured_fields import answer_format
from tests.serving.test_refusals import refused

MESSAGES = [{"role": "user", "content": "abc"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["alpha", "beta"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
CHOICES = ['a "quoted" \\ one', "%json {}", "two\nlines", "Größe", "ab", "abc"]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
LARK = 'start: "a" ("b" | "c")+ "d"'
AMBIGUOUS = 'start: a\na: a a | "x"'
# Fields → what the answer must be; the runtime's own form of the same.
FORMATS = {
    "json_schema": ({"response_format": JSON_SCHEMA}, "json"),
    "guided_json": ({"guided_json": SCHEMA}, "json"),
    "guided_json as text": ({"guided_json": json.dumps(SCHEMA)}, "json"),
    "structured json": ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json"),
    "guided_regex": ({"guided_regex": "[a-c]{3}(x|y)"}, r"[a-c]{3}(x|y)"),
    "structured regex": ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"),
    "guided_grammar": ({"guided_grammar": LARK}, "a[bc]+d"),
    "structured grammar": ({"structured_outputs": {"grammar": LARK, "json_object": False}}, "a[bc]+d"),
    "many choices": ({"guided_choice": [str(number) for number in range(1000)]}, "[0-9]{1,3}"),
    "guided_choice": ({"guided_choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
    "structured choice": ({"structured_outputs": {"choice": CHOICES[:3]}}, "|".join(map(re.escape, CHOICES[:3]))),
    "with text": ({"response_format": {"type": "text"}, "guided_regex": "ab"}, "ab"),
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("name", FORMATS)
def test_formats(client, server, name):
    fields, expected = FORMATS[name]
    own = {key: value for key, value in fields.items() if key == "response_format"}
    other = {key: value for key, value in fields.items() if key not in own}
    asked = {"model": server.name, "messages": MESSAGES, "temperature": 1, "seed": 7, "max_tokens": 200, **own}
    [choice] = client.chat.completions.create(**asked, extra_body=other).choices
    assert choice.finish_reason == "stop"
    if expected == "json":
        validate(json.loads(choice.message.content), SCHEMA)
    else:
        assert re.fullmatch(expected, choice.message.content)
    stream = client.chat.completions.create(**asked, extra_body=other, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in stream) == choice.message.content
    status, answer = server.completion(**fields, max_tokens=200)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_json_objects(client, server):
    """A random model does not end them by itself."""
    for extra in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        status, answer = server.chat(**extra, max_tokens=3)
        assert status == 200
        assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_answers_are_those_of_plain_decoding(server, engine):
    options = {"temperature": 1.0, "seed": 4}
    expected = engine.generate(MESSAGES, response_format=JSON_SCHEMA, drafter="none", max_new_tokens=200, **options)
    status, answer = server.chat(
        messages=MESSAGES, response_format=JSON_SCHEMA, max_tokens=200, return_token_ids=True, **options
    )
    assert status == 200
    assert tuple(answer["choices"][0]["token_ids"]) == expected.token_ids


def deep(depth):
    schema = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = [
    ("response_format", "x"),
    ("response_format.type", {"type": "xml"}),
    ("response_format.type", {"type": "regex", "regex": "a"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format.json_schema", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"schema": []}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}),
    ("response_format", {"type": "json_object", "schema": {}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}),
    ("guided_json", "{"),
    ("guided_json", "[]"),
    ("guided_json", 3),
    ("guided_json", {"$ref": "#"}),
    ("guided_json", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    ("guided_json", {"$ref": "https://example.com/schema"}),
    ("guided_json", json.dumps(deep(200))),
    ("guided_json", json.dumps(deep(400))),
    ("guided_json", '{"enum": [' + "[" * 150 + "]" * 150 + "]}"),
    ("guided_json", {"enum": ["x" * 70_000]}),
    ("guided_json", {"type": "integer", "multipleOf": 1000003}),
    ("guided_json", {"allOf": [{"anyOf": [{"required": [f"{i}"]}, {"required": [f"x{i}"]}]} for i in range(40)]}),
    ("guided_regex", "(a"),
    ("guided_regex", "(?=a)"),
    ("guided_regex", ""),
    ("guided_regex", "(" * 1000 + ")" * 1000),
    ("guided_regex", "a" * 70_000),
    ("guided_grammar", "root ::= a"),
    ("guided_grammar", 'start: %json {"type": "integer", "multipleOf": 1000003}'),
    ("guided_grammar", 'start: %json {"type": "integer", "multiple\\u004ff": 1000003}'),
    ("guided_grammar", "start: %json " + '{"items":' * 2000),
    ("guided_grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000),
    ("guided_choice", []),
    ("guided_choice", "a"),
    ("guided_choice[1]", ["a", ""]),
    ("guided_choice", ["a"] * 400_000),
    ("guided_choice", [str(place) for place in range(9000)]),
    ("structured_outputs", {}),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}),
    ("structured_outputs.whitespace_pattern", {"json": {}, "whitespace_pattern": " "}),
    ("structured_outputs.structural_tag", {"structural_tag": "x"}),
    ("structured_outputs.json_object", {"json_object": 1}),
    ("structured_outputs.regex", {"regex": "(a"}),
]
# Large, and no harm: they are compiled as they are needed.
LARGE = [
    {"guided_regex": "((a|b){1,5000}c){1,5000}"},
    {"guided_regex": "(.*a.{200}){50}"},
    {"guided_choice": [str(place) for place in range(5000)]},
    {"guided_json": {"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**9}},
    {
        "guided_json": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}},
        }
    },
]


@pytest.mark.parametrize(("param", "value"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_is_refused(server, param, value):
    error = refused(server.chat(**{re.split(r"[.\[]", param)[0]: value}))
    assert error["param"] == param
    assert len(error["message"]) < 600


def test_two_formats(server):
    error = refused(server.chat(response_format={"type": "json_object"}, guided_regex="a"))
    assert error["param"] == "guided_regex"
    assert "response_format" in error["message"]
    assert refused(server.completion(guided_choice=["a"], structured_outputs={"regex": "a"}))["param"]
    assert refused(server.chat(response_format={"type": "json_object"}, ignore_eos=True))["param"] == "ignore_eos"
    assert answer_format({}) is None


def test_others_do_not_wait_for_what_is_compiled(server):
    slowest, over = [0.0], threading.Event()

    def ask():
        while not over.is_set():
            begun = time.perf_counter()
            assert server.request("GET", "/health")[0] == 200
            slowest[0] = max(slowest[0], time.perf_counter() - begun)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for fields in LARGE:
            begun = time.perf_counter()
            # One may go beyond what a step may take, which is an error of its own.
            assert server.chat(**fields, max_tokens=1)[0] in (200, 400)
            # A second is what the limits give to a grammar; the rest is for a machine that does other things.
            assert time.perf_counter() - begun < 10
    finally:
        over.set()
        asking.join()
    # A process that is stopped in the middle is no failure of the loop's.
    assert slowest[0] < 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_goes_too_far_ends_its_own_request_alone(server, stream):
    other = []
    asking = threading.Thread(target=lambda: other.append(server.chat(max_tokens=200, ignore_eos=True)[0]))
    asking.start()
    fields = {"guided_grammar": AMBIGUOUS, "max_tokens": 400, "logit_bias": {"256": -100}, "stream": stream}
    status, answer = server.chat(**fields)
    if stream:
        assert status == 200
        answer = json.loads(answer.strip().rpartition("data: ")[2])
        status = 400
    error = refused((status, answer))
    assert (error["param"], error["type"]) == ("guided_grammar", "invalid_request_error")
    assert "went beyond its limits" in error["message"]
    asking.join()
    assert other == [200]
