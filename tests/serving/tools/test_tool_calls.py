"""The official client calls functions: a grammar makes a random model do so."""

import json

import openai
import pytest

from serving.chat_request import read_chat_request
from serving.tools.call_formats import HERMES
from serving.tools.call_support import calls_of
from tests.serving.servers import until
from tests.serving.test_refusals import refused
from tests.serving.test_requests import MODEL

MESSAGES = [{"role": "user", "content": "Weather in Bonn?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
# Where an answer may end, it is likely to.
DRAWN = {"temperature": 1.0, "seed": 3, "max_tokens": 300, "logit_bias": {"256": 5}}


@pytest.fixture(scope="module")
def client(hermes):
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def check_call(name, arguments):
    value = json.loads(arguments)
    if name == "time":
        assert value == {}
    else:
        assert name == "weather"
        assert set(value) == {"city", "unit"}
        assert value["unit"] in ("C", "F")


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("seed", [1, 2])
def test_whole_and_streamed_calls_are_the_same(client, hermes, choice, seed):
    asked = {"model": hermes.name, "messages": MESSAGES, "tools": [WEATHER, TIME], "tool_choice": choice}
    asked |= {**DRAWN, "seed": seed, "parallel_tool_calls": seed == 1}
    [whole] = client.chat.completions.create(**asked).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    calls = whole.message.tool_calls
    assert len(calls) == 1 or (seed == 1 and choice == "required")
    for call in calls:
        assert (call.type, call.id[:5]) == ("function", "call_")
        check_call(call.function.name, call.function.arguments)
    assert len({call.id for call in calls}) == len(calls)

    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [one.choices[0].finish_reason for one in chunks][-1] == "tool_calls"
    assert chunks[-1].choices[0].delta.model_dump(exclude_none=True) == {}
    found = []
    for chunk in chunks[1:]:
        assert not chunk.choices[0].delta.content
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.id is not None:
                assert (delta.index, delta.type, delta.function.arguments) == (len(found), "function", "")
                found.append([delta.function.name, ""])
            else:
                assert delta.function.name is None
                found[delta.index][1] += delta.function.arguments
    assert found == [[call.function.name, call.function.arguments] for call in calls]


def test_the_clients_own_accumulation(client, hermes):
    with client.chat.completions.stream(
        model=hermes.name, messages=MESSAGES, tools=[WEATHER], tool_choice="required", **DRAWN
    ) as stream:
        final = stream.get_final_completion()
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    for call in choice.message.tool_calls:
        check_call(call.function.name, call.function.arguments)


def test_calls_are_those_of_plain_decoding(hermes, loaded):
    body = {"model": "m", "messages": MESSAGES, "tools": [WEATHER, TIME], "tool_choice": "required", **DRAWN}
    model = type(MODEL)(name="m", defaults={}, template="", max_length=512, calls=HERMES)
    request = read_chat_request(body, model)
    plain = loaded.generate(MESSAGES, **request.options, drafter="none")
    status, answer = hermes.chat(**{**body, "model": hermes.name}, return_token_ids=True)
    assert status == 200
    assert tuple(answer["choices"][0]["token_ids"]) == plain.token_ids
    encoded = loaded.encode(MESSAGES, tools=request.options["tools"]).tolist()
    assert answer["prompt_token_ids"] == encoded
    assert answer["usage"]["completion_tokens"] == len(plain.token_ids)


def test_token_ids_of_a_stream(client, hermes):
    asked = {"model": hermes.name, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", **DRAWN}
    asked["extra_body"] = {"return_token_ids": True}
    whole = client.chat.completions.create(**asked).choices[0].model_extra["token_ids"]
    chunks = list(client.chat.completions.create(**asked, stream=True))[1:]
    assert [token for one in chunks for token in one.choices[0].model_extra["token_ids"]] == whole


def test_several_choices(client, hermes):
    answer = client.chat.completions.create(
        model=hermes.name, messages=MESSAGES, tools=[WEATHER], tool_choice=NAMED, n=3, **DRAWN
    )
    arguments = [one.message.tool_calls[0].function.arguments for one in answer.choices]
    assert len(set(arguments)) > 1
    assert answer.usage.prompt_tokens < answer.usage.completion_tokens + answer.usage.total_tokens


@pytest.mark.parametrize("fields", [{"tools": [TIME]}, {"tools": [WEATHER]}, {"tools": [TIME], "tool_choice": "none"}])
def test_text_is_free(client, hermes, fields):
    """With strict functions as well; a random model does not find the beginning of a call."""
    answer = client.chat.completions.create(
        model=hermes.name, messages=MESSAGES, temperature=1, seed=5, max_tokens=24, **fields
    )
    [choice] = answer.choices
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")


def test_a_call_that_is_cut(client, hermes):
    asked = {
        "model": hermes.name,
        "messages": MESSAGES,
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 60,
    }
    [choice] = client.chat.completions.create(**asked, seed=1).choices
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert call.function.arguments.startswith("{")
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        json.loads(call.function.arguments)


def test_llama_calls(llama):
    for stream in (False, True):
        with openai.OpenAI(base_url=f"{llama.url}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": llama.name, "messages": MESSAGES, "tools": [TIME, WEATHER], "tool_choice": "required"}
            answer = client.chat.completions.create(**asked, **DRAWN, stream=stream)
            if not stream:
                [call] = answer.choices[0].message.tool_calls
                check_call(call.function.name, call.function.arguments)
                whole = (call.function.name, call.function.arguments)
                continue
            deltas = [one for chunk in answer for one in chunk.choices[0].delta.tool_calls or []]
            assert (deltas[0].function.name, "".join(one.function.arguments for one in deltas)) == whole


def test_schemas_that_cannot_be_followed(hermes):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    tools = [{"type": "function", "function": function}]
    error = refused(hermes.chat(tools=tools, tool_choice="required"))
    assert error["param"] == "tools"
    assert "tools cannot be compiled" in error["message"]
    # For the model's eyes alone it may stand.
    assert hermes.chat(tools=tools)[0] == 200


def test_engines_whose_templates_know_no_functions(server, engine, hermes):
    error = refused(server.chat(tools=[TIME]))
    assert error["param"] == "tools"
    assert "does not read them" in error["message"]
    assert server.chat(tools=[TIME], tool_choice="none")[0] == 200
    assert calls_of(engine.codec, "hermes")[0] is None
    until(lambda: hermes.under_way() == 0, "something goes on")


def test_a_marker_that_no_text_shows(loaded, monkeypatch):
    assert calls_of(loaded.codec, "") == (HERMES, "")
    monkeypatch.setattr(type(loaded.codec.tokenizer), "token_to_id", lambda self, name: 256, raising=False)
    assert "special token" in calls_of(loaded.codec, "")[1]
