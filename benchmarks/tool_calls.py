"""Calls of functions over HTTP by a real model: whether they are valid, exact, and whether the prompt is the right one.

    python benchmarks/tool_calls.py build/qwen2.5-coder-1.5b-w8a8

It starts the server itself, on loopback. Eight questions, each with six functions, are asked at once with every
`tool_choice`, with "required" once more for one call alone, and with "auto" for strict functions: as a whole answer by
plain decoding, and as a stream with drafts, which must give the same ids, texts and calls. What "required" and a named
function give must be calls that their schemas allow. Then the call's result goes back as a message of the role tool,
and the answer to it is checked likewise. Every prompt must have the ids of the text that transformers renders from the
same template. The last line is JSON; a check that fails ends with exit code 1.
"""

import argparse
import http.client
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
from server_load import NAME, Server
from transformers.utils.chat_template_utils import render_jinja_template

from engines.manifest import read_manifest
from engines.text import open_codec
from quasar.text import TextCodec

Json = dict[str, Any]
SLOTS = 8
_SHOWN = 160


def _function(name: str, description: str, properties: Json, required: list[str]) -> Json:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_PLACE: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "string", "description": "ISO code, such as DE"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    _function(
        "get_weather",
        "The weather at a place.",
        {"place": _PLACE, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        ["place", "unit"],
    ),
    _function(
        "create_event",
        "Put an event into the calendar.",
        {
            "title": {"type": "string"},
            "day": {"type": "string", "enum": ["monday", "tuesday", "wednesday", "thursday", "friday"]},
            "hour": {"type": "integer", "minimum": 0, "maximum": 23},
            "guests": {
                "type": "array",
                "maxItems": 4,
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "role": {"enum": ["host", "guest"]}},
                    "required": ["name", "role"],
                    "additionalProperties": False,
                },
            },
        },
        ["title", "day", "hour"],
    ),
    _function(
        "search_orders",
        "Find orders of a shop.",
        {
            "filter": {
                "type": "object",
                "properties": {
                    "status": {"enum": ["open", "paid", "shipped", "returned"]},
                    "amount": {
                        "type": "object",
                        "properties": {"min": {"type": "number"}, "max": {"type": "number"}},
                        "additionalProperties": False,
                    },
                },
                "required": ["status"],
                "additionalProperties": False,
            },
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        },
        ["filter"],
    ),
    _function(
        "convert_currency",
        "An amount in another currency.",
        {
            "amount": {"type": "number"},
            "source": {"enum": ["EUR", "USD", "GBP", "JPY"]},
            "target": {"enum": ["EUR", "USD", "GBP", "JPY"]},
        },
        ["amount", "source", "target"],
    ),
    _function(
        "run_query",
        "Run a query of SQL.",
        {"sql": {"type": "string", "maxLength": 200}, "read_only": {"type": "boolean"}},
        ["sql"],
    ),
    {"type": "function", "function": {"name": "current_time", "description": "The time now, in UTC."}},
]
# A question, the function for it, and that one's result.
QUESTIONS = [
    ("How warm is it in Bonn, Germany, in celsius?", "get_weather", '{"temperature": 17.5, "sky": "rain"}'),
    ("Is it raining in São Paulo? Use fahrenheit.", "get_weather", '{"temperature": 73, "sky": "clear"}'),
    ("Plan a review with Ana as the host on tuesday at 14.", "create_event", '{"id": 4711, "conflicts": 0}'),
    ("Which paid orders are above 100 euros? Five of them.", "search_orders", '[{"id": 88, "amount": 130.0}]'),
    ("List the returned orders.", "search_orders", "[]"),
    ("How many dollars are 250 euros?", "convert_currency", '{"amount": 271.3}'),
    ("How many rows has the table users? Ask the database.", "run_query", '[{"count": 1234}]'),
    ("What time is it?", "current_time", '"2026-03-01T09:30:00Z"'),
]
_STRICT = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
# New tokens of an answer in which no whole call is looked for.
_FEW = 32
# Without `tool_choice` the function for the question is named.
CHOICES: dict[str, Json] = {
    "required": {"tool_choice": "required"},
    "required, one call": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {},
    "auto": {"tool_choice": "auto"},
    "auto, strict": {"tool_choice": "auto", "tools": _STRICT},
    "none": {"tool_choice": "none", "max_tokens": _FEW},
    "after a result": {"tool_choice": "auto", "max_tokens": _FEW},
    "after a result, none": {"tool_choice": "none", "max_tokens": _FEW},
}
# Without a grammar arguments are what the model makes of them.
_FREE = ("auto", "after a result")


def ask(url: str, body: Json) -> Json:
    """The one choice of an answer, whole or put together from a stream, with the ids of its prompt."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    if response.status != HTTPStatus.OK:
        raise SystemExit(f"status {response.status}: {data[:400]!r}")
    if not body["stream"]:
        answer = json.loads(data)
        [choice] = answer["choices"]
        message = choice["message"]
        calls = [[one["function"]["name"], one["function"]["arguments"]] for one in message.get("tool_calls") or ()]
        found = {"content": message["content"] or "", "calls": calls, "finish_reason": choice["finish_reason"]}
        return {**found, "ids": choice["token_ids"], "prompt_ids": answer["prompt_token_ids"]}
    return _put_together([json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")])


def _put_together(chunks: list[Json]) -> Json:
    found: Json = {"content": "", "calls": [], "finish_reason": None, "ids": [], "prompt_ids": None}
    for chunk in chunks:
        if "error" in chunk:
            raise SystemExit(f"a stream ended with {chunk['error']}")
        found["prompt_ids"] = found["prompt_ids"] or chunk.get("prompt_token_ids")
        for choice in chunk["choices"]:
            found["content"] += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls") or ():
                if "id" in delta:
                    found["calls"].append([delta["function"]["name"], ""])
                found["calls"][delta["index"]][1] += delta["function"]["arguments"]
            found["ids"] += choice.get("token_ids") or ()
            found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
    return found


class Asker:
    """Asks in every way, and counts, in several threads."""

    def __init__(self, url: str, codec: TextCodec, tokens: int) -> None:
        self._url, self._codec, self._tokens = url, codec, tokens
        assert codec.chat_template is not None
        self._template = codec.chat_template.tool_source
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def answer(self, name: str, question: str, fields: Json) -> Json:
        """The answer, which is the same both ways; `name`: what its counts are under."""
        body = {"model": NAME, "temperature": 0, "top_p": 1, "repetition_penalty": 1, "max_tokens": self._tokens}
        body |= {"user": "benchmark", "return_token_ids": True, "stream": False, **fields}
        plain = ask(self._url, {**body, "drafter": "none"})
        other = ask(self._url, {**body, "stream": True})
        self.counts[f"{name}: asked"] += 1
        if other == plain:
            self.counts["a stream with drafts as plain decoding"] += 1
        else:
            self.failures.append(f"{name}, {question}: plain {plain}, with drafts {other}")
        if plain["prompt_ids"] == self._rendered(fields):
            self.counts["prompts as rendered by transformers"] += 1
        else:
            self.failures.append(f"{name}, {question}: another prompt than transformers renders")
        self._check_calls(name, question, plain)
        print(f"{name}: {question}: {plain['calls'] or plain['content'][:_SHOWN]!r}", flush=True)
        return plain

    def _rendered(self, fields: Json) -> list[int]:
        """The ids of the prompt, as transformers renders it; arguments of calls are objects there."""
        messages = json.loads(json.dumps(fields["messages"]))
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        shown = None if fields["tool_choice"] == "none" else [_as_shown(one) for one in fields["tools"]]
        [text] = render_jinja_template(
            [messages], tools=shown, chat_template=self._template, add_generation_prompt=True
        )[0]
        ids: list[int] = self._codec.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _check_calls(self, name: str, question: str, answer: Json) -> None:
        """Counts an answer's calls; those that a grammar made must be valid, but for a last one that was cut."""
        schemas = {one["function"]["name"]: one["function"].get("parameters", {"maxProperties": 0}) for one in TOOLS}
        calls = answer["calls"]
        if not calls:
            self.counts[f"{name}: text"] += 1
            return
        self.counts[f"{name}: calls"] += 1
        self.counts[f"{name}: several calls"] += len(calls) > 1
        is_cut = answer["finish_reason"] == "length"
        self.counts[f"{name}: cut"] += is_cut
        try:
            for function, arguments in calls[: len(calls) - is_cut]:
                jsonschema.validate(json.loads(arguments), schemas[function])
        except (ValueError, jsonschema.ValidationError) as error:
            if name not in _FREE:
                self.failures.append(f"{name}, {question}: {calls}: {str(error)[:_SHOWN]}")
            return
        self.counts[f"{name}: valid"] += 1

    def question(self, question: str, function: str, result: str) -> None:
        """One question with every choice, and the result of its call."""
        named = {"type": "function", "function": {"name": function}}
        arguments = "{}"
        for name, choice in CHOICES.items():
            fields = {"tools": TOOLS, "tool_choice": named, **choice}
            messages: list[Json] = [{"role": "user", "content": question}]
            if name.startswith("after a result"):
                call = {"id": "call_1", "type": "function", "function": {"name": function, "arguments": arguments}}
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
                messages.append({"role": "tool", "tool_call_id": "call_1", "content": result})
            answer = self.answer(name, question, {"messages": messages, **fields})
            names = [one for one, _ in answer["calls"]]
            self.counts[f"{name}: the function meant, alone"] += names == [function]
            if name == "named" and names == [function]:
                arguments = answer["calls"][0][1]
            if not _is_as_asked(name, answer, named=names == [function]):
                self.failures.append(f"{name}, {question}: {answer}")


def _is_as_asked(name: str, answer: Json, *, named: bool) -> bool:
    """Whether an answer is what its choice allows; `named`: it is one call of the function for the question."""
    if name in ("none", "after a result, none"):
        return not answer["calls"]
    if name == "named":
        return named and answer["finish_reason"] == "tool_calls" and not answer["content"]
    if name == "required, one call":
        return len(answer["calls"]) == 1 and answer["finish_reason"] == "tool_calls" and not answer["content"]
    return name != "required" or (bool(answer["calls"]) and not answer["content"])


def _as_shown(tool: Json) -> Json:
    """The function as the server shows it: without `strict`, and with parameters in any case."""
    function = {"parameters": {"type": "object", "properties": {}}, **tool["function"]}
    return {"type": "function", "function": {key: function[key] for key in ("name", "description", "parameters")}}


def main() -> int:
    """Ask everything; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--tokens", type=int, default=120, help="new tokens of an answer")
    options = parser.parse_args()
    server = Server(options.engine, SLOTS)
    try:
        manifest, _ = read_manifest(options.engine / "manifest.json")
        asker = Asker(server.url, open_codec(options.engine, manifest.text), options.tokens)
        with ThreadPoolExecutor(SLOTS) as pool:
            for done in [pool.submit(asker.question, *one) for one in QUESTIONS]:
                done.result()
    finally:
        server.kill()
    for failure in asker.failures:
        print(f"FAILED: {failure}")
    for name, count in sorted(asker.counts.items()):
        print(f"{name}: {count}")
    print(json.dumps({**asker.counts, "failures": asker.failures}))
    return 1 if asker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
