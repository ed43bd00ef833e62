"""What `response_format` may be, and what is said of everything else."""

import json

import pytest

from quasar.errors import GrammarError
from runtime.generation_options import GenerationOptions
from runtime.grammar.formats import MOST_BYTES, Grammar, read_format, read_schema_file

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}


def read(value):
    return read_format("response_format", value)


def schema(value, **others):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value, **others}}


def test_formats():
    assert read(None) is None
    assert read({"type": "text"}) is None
    assert read({"type": "json_object"}) == Grammar(kind="json_schema", text='{"type": "object"}')
    assert read({"type": "regex", "regex": "a+"}) == Grammar(kind="regex", text="a+")
    assert read({"type": "grammar", "grammar": 'start: "a"'}) == Grammar(kind="lark", text='start: "a"')
    # The order of properties is the order in which they are written.
    assert read(schema(SCHEMA, strict=True, description=None)).text == json.dumps(SCHEMA)
    assert read({"type": "json_schema", "json_schema": {"schema": SCHEMA}}) == read(schema(SCHEMA, strict=False))


def test_a_schema_that_is_changed_later_stays_what_it_was():
    mine = {"type": "object", "properties": {}}
    options = GenerationOptions(response_format=schema(mine))
    mine["properties"]["x"] = {"type": "string"}
    assert options.grammar.text == '{"type": "object", "properties": {}}'


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", r"response_format has the type 'json'; one of text, json_object, json_schema, regex, grammar was exp"),
        ({}, r"response_format has the type \{\}"),
        ({"type": "xml"}, "response_format has the type 'xml'"),
        ({"type": ["text"]}, r"response_format has the type \['text'\]"),
        ({"type": "text", "regex": "a"}, "type 'text' has the key 'regex'; the type alone was expected"),
        ({"type": "regex"}, "response_format of type 'regex' lacks 'regex'"),
        ({"type": "regex", "regex": ""}, "response_format.regex is ''; text that is not empty was expected"),
        ({"type": "regex", "regex": 5}, "response_format.regex is 5"),
        ({"type": "regex", "regex": "a", "schema": {}}, "has the key 'schema'; 'regex' beside the type was expected"),
        ({"type": "regex", "regex": "a" * (MOST_BYTES + 1)}, f"has {MOST_BYTES + 1} bytes; at most {MOST_BYTES}"),
        ({"type": "grammar", "grammar": "\ud800"}, "response_format.grammar is not Unicode text"),
        ({"type": "json_schema"}, "response_format of type 'json_schema' lacks 'json_schema'"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "is {'name': 'x'}; a dict with 'schema' was expected"),
        (schema("x"), "response_format.json_schema.schema is 'x'; mapping was expected"),
        (schema(SCHEMA, strict="yes"), "response_format.json_schema.strict is 'yes'; bool was expected"),
        (schema(SCHEMA, extra=1), "has the key 'extra'; known are name, description, schema, strict"),
        (schema({"enum": [object]}), "response_format.json_schema.schema is no JSON"),
        (schema({"minimum": float("nan")}), "response_format.json_schema.schema is no JSON"),
        (schema(nested(100_000)), "response_format.json_schema.schema is no JSON"),
        (schema({"items": {"multipleOf": 1_000_003}}), "the least common multiple 1000003; at most 10000 was expected"),
        (schema({"allOf": [{"multipleOf": 0.0997}, {"multipleOf": 991}]}), "the least common multiple 988027"),
    ],
    ids=range(21),
)
def test_what_is_no_format_is_refused(value, message):
    with pytest.raises(GrammarError, match=message):
        GenerationOptions(response_format=value)


def test_numbers_that_must_divide_may_be_round():
    for value in (1_000_000, 0.01, 2.5, 9973, 1e-9):
        assert read(schema({"multipleOf": value})) is not None


def test_ignore_eos_has_no_meaning_under_a_grammar():
    with pytest.raises(GrammarError.__base__, match="ignore_eos came with a response_format"):
        GenerationOptions(response_format={"type": "json_object"}, ignore_eos=True)
    assert GenerationOptions(response_format={"type": "text"}, ignore_eos=True).grammar is None


def test_a_schema_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert read(read_schema_file(path)).text == json.dumps(SCHEMA)
    assert read_schema_file(None) is None
    path.write_text("[1]")
    with pytest.raises(GrammarError, match=r"schema.json holds a list; a JSON schema, an object, was expected"):
        read_schema_file(path)
    path.write_text("{")
    with pytest.raises(GrammarError, match=r"schema.json cannot be read as JSON"):
        read_schema_file(path)
