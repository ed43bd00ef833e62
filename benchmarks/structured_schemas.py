"""JSON schemas for tests of structured output: random ones whose answers end, and hard ones picked by hand."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("red", "green", "two words", "über", 'a "quote"', "", "x" * 20, "null", "12")
_PATTERNS = (r"[a-c]{1,4}-[0-9]{2}", r"(yes|no|maybe)", r"[A-Z][a-z]{0,5}", r"\d{3}(\.\d{1,2})?")


def random_schema(seed: int, *, depth: int = 3) -> Schema:
    """A schema of objects, arrays, choices and bounded scalars: every answer to it ends."""
    rng = random.Random(seed)
    if rng.random() < 0.2:
        shared = _any(rng, 1)
        return {"$defs": {"shared": shared}, **_object(rng, depth, lambda: {"$ref": "#/$defs/shared"})}
    return _object(rng, depth, None) if rng.random() < 0.7 else _any(rng, depth)


def _any(rng: random.Random, depth: int, reference: Callable[[], Schema] | None = None) -> Schema:
    if reference is not None and rng.random() < 0.3:
        return reference()
    if depth <= 0 or rng.random() < 0.4:
        return _scalar(rng)
    kind = rng.choice(("object", "array", "tuple", "anyOf"))
    if kind == "object":
        return _object(rng, depth, reference)
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array",
            "items": _any(rng, depth - 1, reference),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "tuple":
        items = [_any(rng, depth - 1, reference) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return {"anyOf": [_any(rng, depth - 1, reference) for _ in range(rng.randint(2, 3))]}


def _object(rng: random.Random, depth: int, reference: Callable[[], Schema] | None) -> Schema:
    names = rng.sample(["name", "kind", "long key with spaces", "größe", "a", "b2", "items"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1, reference) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _scalar(rng: random.Random) -> Schema:
    kind = rng.choice(("string", "pattern", "enum", "const", "integer", "quarter", "boolean", "null", "either"))
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
    if kind == "pattern":
        return {"type": "string", "pattern": f"^{rng.choice(_PATTERNS)}$"}
    if kind == "enum":
        return {"enum": [*rng.sample(_WORDS, rng.randint(1, 4)), rng.choice((True, None, 7, -1.5))]}
    if kind == "const":
        return {"const": rng.choice((*_WORDS, 3, False))}
    if kind == "integer":
        least = rng.randint(-200, 200)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 2000)}
    if kind == "quarter":
        return {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": rng.randint(1, 99)}
    if kind == "either":
        return {"type": ["boolean", "null"]}
    return {"type": kind}


def _nested(levels: int) -> Schema:
    schema: Schema = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"in": schema}, "required": ["in"], "additionalProperties": False}
    return schema


def _wide(count: int) -> Schema:
    properties = {f"property_{number:03}": {"type": "boolean"} for number in range(count)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _required(schema: Schema) -> Schema:
    return {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}


# What is hard about each: recursion, ambiguity, size, unusual characters, keywords that few support. Some of them are
# refused, with a reason; none may hang or give an answer that ends and is invalid.
HARD: dict[str, Schema] = {
    "linked list": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "expression tree": {
        "$ref": "#/$defs/e",
        "$defs": {
            "e": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 9},
                    {
                        "type": "array",
                        "prefixItems": [{"enum": ["+", "*"]}, {"$ref": "#/$defs/e"}, {"$ref": "#/$defs/e"}],
                        "items": False,
                        "minItems": 3,
                    },
                ]
            }
        },
    },
    "any JSON": {},
    "any object": {"type": "object"},
    "map of integers": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 99},
        "maxProperties": 3,
    },
    "nested 40 deep": _nested(40),
    "nested 200 deep": _nested(200),
    "100 optional properties": _wide(100),
    "2000 optional properties": _wide(2000),
    "common beginnings": {"enum": ["a" * count for count in range(1, 40)]},
    "500 values": _required({"enum": [f"value number {number}" for number in range(500)]}),
    "overlapping choices": {
        "anyOf": [{"type": "string", "pattern": "^a[a-z]{0,5}$"}, {"type": "string", "pattern": "^[a-z]{0,5}b$"}]
    },
    "one of many objects": {"anyOf": [_required({"const": f"kind {number}"}) for number in range(60)]},
    "all of": {"allOf": [_required({"type": "integer", "minimum": 5}), _required({"type": "integer", "maximum": 40})]},
    "date and time": _required({"type": "string", "format": "date-time"}),
    "uuid": _required({"type": "string", "format": "uuid"}),
    "ipv4": _required({"type": "string", "format": "ipv4"}),
    "multiples": _required({"type": "integer", "multipleOf": 37, "minimum": 100, "maximum": 5000}),
    "huge multiples": _required({"type": "integer", "multipleOf": 999_983}),
    "negative decimals": _required({"type": "number", "multipleOf": 0.01, "minimum": -5, "maximum": -1}),
    "exact length": _required({"type": "string", "minLength": 30, "maxLength": 30}),
    "very long strings": _required({"type": "string", "minLength": 3000, "maxLength": 100_000}),
    "escapes": _required({"enum": ['"', "\\", "\n\t", "\u0001", "é", "日本語", "🙂", "</script>", "<|im_end|>"]}),
    "odd keys": {
        "type": "object",
        "properties": {"": {"const": 1}, '"': {"const": 2}, "日本": {"const": 3}, "a\\b": {"const": 4}},
        "required": ["", '"', "日本", "a\\b"],
        "additionalProperties": False,
    },
    "slow expression": _required({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "maxLength": 40}),
    "counted expression": _required({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}),
    "not": {"not": {"type": "string"}},
    "nothing fits": _required({"type": "integer", "minimum": 5, "maximum": 4}),
    "remote reference": {"$ref": "https://example.com/schema.json"},
    "unique items": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "maxItems": 3},
}
