"""The official client against a real server: answers are those of `engine.generate`, whole and streamed."""

import asyncio

import openai
import pytest

GREEDY = {"temperature": 0}
DRAWN = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abc abc abc"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ids(choice):
    return tuple(choice.model_extra["token_ids"])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_chat_is_the_engines_answer(client, server, engine, sampling):
    expected = engine.generate(MESSAGES, max_new_tokens=40, **sampling)
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, max_tokens=40, extra_body={"return_token_ids": True}, **sampling
    )
    [choice] = answer.choices
    assert (choice.message.content, ids(choice)) == (expected.text, expected.token_ids)
    assert (choice.message.role, choice.finish_reason) == ("assistant", expected.finish_reason)
    assert answer.model_extra["prompt_token_ids"] == engine.encode(MESSAGES).tolist()
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", server.name, "chatcmpl-")
    assert answer.system_fingerprint == f"quasar-{engine.manifest.engine_hash[:12]}"
    assert answer.usage.prompt_tokens == len(engine.encode(MESSAGES))
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_is_the_same_answer_in_pieces(client, server, engine, sampling):
    expected = engine.generate(MESSAGES, max_new_tokens=40, **sampling)
    chunks = list(
        client.chat.completions.create(
            model=server.name,
            messages=MESSAGES,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
            **sampling,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    *steps, last = chunks
    assert "".join(one.choices[0].delta.content or "" for one in steps) == expected.text
    assert sum((ids(one.choices[0]) for one in steps[1:]), ()) == expected.token_ids
    assert [one.choices[0].finish_reason for one in steps][-1] == expected.finish_reason
    assert {one.choices[0].finish_reason for one in steps[:-1]} == {None}
    assert (last.choices, last.usage.completion_tokens) == ([], len(expected.token_ids))
    assert all(one.usage is None for one in steps)
    assert len({(one.id, one.created, one.object) for one in chunks}) == 1


@pytest.mark.parametrize("prompt", ["one two one two", [64, 65, 66, 64, 65]], ids=["text", "ids"])
def test_a_completion_is_the_engines_answer(client, server, engine, prompt):
    expected = engine.generate(prompt, max_new_tokens=24, chat_template=False, **DRAWN)
    answer = client.completions.create(model=server.name, prompt=prompt, max_tokens=24, **DRAWN)
    assert (answer.choices[0].text, answer.object) == (expected.text, "text_completion")
    streamed = client.completions.create(model=server.name, prompt=prompt, max_tokens=24, stream=True, **DRAWN)
    assert "".join(one.choices[0].text for one in streamed) == expected.text


def test_completions_of_many_prompts_and_choices(client, server, engine):
    prompts = ["abc", [64, 65, 66], "one two"]
    options = {"max_new_tokens": 8, "chat_template": False, "temperature": 1.0}
    expected = [
        engine.generate(prompts[index // 2], **options, seed=11 + index).text for index in range(2 * len(prompts))
    ]
    answer = client.completions.create(model=server.name, prompt=prompts, n=2, max_tokens=8, temperature=1, seed=11)
    assert [one.text for one in answer.choices] == expected
    assert [one.index for one in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == sum(len(engine.encode(one, chat_template=False)) for one in prompts)
    whole = {"ignore_eos": True}
    assert client.completions.create(model=server.name, prompt="abc", extra_body=whole).usage.completion_tokens == 16


def test_echo(client, server):
    plain = client.completions.create(model=server.name, prompt=["ab", "cd"], max_tokens=4, **GREEDY)
    for stream in (False, True):
        echoed = client.completions.create(
            model=server.name, prompt=["ab", "cd"], max_tokens=4, echo=True, stream=stream, **GREEDY
        )
        texts = {0: "", 1: ""}
        for part in echoed if stream else [echoed]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == {0: "ab" + plain.choices[0].text, 1: "cd" + plain.choices[1].text}


def test_choices_have_the_next_seeds(client, server, engine):
    expected = [
        engine.generate(MESSAGES, max_new_tokens=20, temperature=0.9, seed=(2**64 - 2 + index) % 2**64).text
        for index in range(4)
    ]
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, max_tokens=20, n=4, temperature=0.9, seed=-2
    )
    assert [one.message.content for one in answer.choices] == expected
    assert answer.usage.prompt_tokens == len(engine.encode(MESSAGES))


def test_eight_at_a_time_get_what_each_gets_alone(server, engine):
    def sampling(place):
        return {"temperature": place % 2, "seed": place}

    def prompt(place):
        return [{"role": "user", "content": f"{place} abc abc {place}"}]

    async def one(client, place):
        if place % 3:
            answer = await client.chat.completions.create(
                model=server.name, messages=prompt(place), max_tokens=60, **sampling(place)
            )
            return answer.choices[0].message.content
        stream = await client.chat.completions.create(
            model=server.name, messages=prompt(place), max_tokens=60, stream=True, **sampling(place)
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, place) for place in range(8)))

    expected = [engine.generate(prompt(place), max_new_tokens=60, **sampling(place)).text for place in range(8)]
    assert asyncio.run(all_of_them()) == expected


def test_logprobs_of_a_chat(client, server, engine):
    expected = engine.generate(MESSAGES, max_new_tokens=10, temperature=0, logprobs=3)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=server.name,
            messages=MESSAGES,
            max_tokens=10,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
            **GREEDY,
        )
        content = [
            entry
            for part in (answer if stream else [answer])
            for choice in part.choices
            if choice.logprobs
            for entry in choice.logprobs.content
        ]
        assert [one.logprob for one in content] == [one.logprob for one in expected.logprobs]
        assert [[top.logprob for top in one.top_logprobs] for one in content] == [
            [logprob for _, logprob in one.top] for one in expected.logprobs
        ]
        joined = bytes(byte for one in content for byte in one.bytes)
        assert joined.decode(errors="replace") == expected.text


def test_logprobs_of_a_completion(client, server, engine):
    expected = engine.generate("abc", max_new_tokens=6, temperature=0, logprobs=2, chat_template=False)
    whole = client.completions.create(model=server.name, prompt="abc", max_tokens=6, logprobs=2, **GREEDY)
    found = whole.choices[0].logprobs
    assert found.token_logprobs == [one.logprob for one in expected.logprobs]
    assert [sorted(one.values()) for one in found.top_logprobs] == [
        sorted(logprob for _, logprob in one.top) for one in expected.logprobs
    ]
    assert len(found.tokens) == len(found.text_offset) == 6
    parts = list(
        client.completions.create(model=server.name, prompt="abc", max_tokens=6, logprobs=2, stream=True, **GREEDY)
    )
    streamed = [one.choices[0].logprobs for one in parts if one.choices[0].logprobs]
    assert [token for one in streamed for token in one.tokens] == found.tokens
    assert [offset for one in streamed for offset in one.text_offset] == found.text_offset


def test_every_other_option_reaches_the_engine(client, server, engine):
    options = {
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {70: 5.0, 71: -100.0},
        "ignore_eos": True,
        "stop_token_ids": [75],
        "stop": ["zq"],
    }
    expected = engine.generate(MESSAGES, max_new_tokens=30, min_new_tokens=3, **options, **DRAWN)
    own = ("presence_penalty", "frequency_penalty", "stop")
    answer = client.chat.completions.create(
        model=server.name,
        messages=MESSAGES,
        max_tokens=30,
        **{name: options[name] for name in own},
        logit_bias={"70": 5, "71": -100},
        extra_body={
            "min_tokens": 3,
            "priority": 1,
            **{name: value for name, value in options.items() if name not in (*own, "logit_bias")},
        },
        **DRAWN,
    )
    assert answer.choices[0].message.content == expected.text


def test_an_answer_that_was_begun_goes_on(client, server, engine):
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    expected = engine.generate(begun, max_new_tokens=8, continue_final_message=True)
    for extra in ({}, {"add_generation_prompt": False}):
        answer = client.chat.completions.create(
            model=server.name,
            messages=begun,
            max_tokens=8,
            extra_body={"continue_final_message": True, **extra},
            **GREEDY,
        )
        assert answer.choices[0].message.content == expected.text


def test_messages_as_clients_send_them(client, server, engine):
    """Text parts, nulls, and a developer where the template knows none."""
    sent = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "hi"},
    ]
    plain = [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hi"},
    ]
    answer = client.chat.completions.create(model=server.name, messages=sent, max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == engine.generate(plain, max_new_tokens=12).text


def test_without_a_temperature_tokens_are_drawn(client, server, engine):
    answer = client.chat.completions.create(model=server.name, messages=MESSAGES, max_tokens=12, seed=3)
    expected = engine.generate(MESSAGES, max_new_tokens=12, temperature=1.0, seed=3)
    assert answer.choices[0].message.content == expected.text


def test_one_cache_for_one_name(client, server, engine):
    """`prompt_cache_key` and `user` name a cache; answers to one prompt serve each other in any case."""
    long = [{"role": "user", "content": "a rather long beginning " * 8}]

    def reused(**fields):
        answer = client.chat.completions.create(model=server.name, messages=long, max_tokens=1, **fields, **GREEDY)
        return answer.usage.prompt_tokens_details.cached_tokens

    shares = engine.record.row_invariance.prefill
    assert reused() == 0
    assert reused(prompt_cache_key="a") == 0
    assert (reused(prompt_cache_key="a") > 0) == shares
    assert (reused(user="a") > 0) == shares
    assert reused(user="b") == 0
    assert reused() == 0


def test_answers_to_one_prompt_compute_it_once(client, server, engine):
    """Also where the request names no cache."""
    before = server.metric("vllm:prefix_cache_hits_total")
    client.completions.create(model=server.name, prompt="another long beginning " * 8, n=4, max_tokens=2)
    assert (server.metric("vllm:prefix_cache_hits_total") > before) == engine.record.row_invariance.prefill


def test_models(client, server):
    [only] = client.models.list().data
    assert (only.id, only.object) == (server.name, "model")
    assert client.models.retrieve(server.name) == only
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-6")
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-6", messages=MESSAGES)
    assert (raised.value.param, raised.value.code) == ("model", "model_not_found")


def test_errors_are_those_of_the_client(client, server):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": "x" * 600}])
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=server.name, prompt="x" * 600, stream=True)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
