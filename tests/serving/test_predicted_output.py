"""OpenAI's predicted outputs with its own client: the same answers, and what `usage` says of the prediction."""

from types import SimpleNamespace

import openai
import pytest

from serving.predicted_output import prediction_details

MESSAGES = [{"role": "user", "content": "abc abc abc"}]
OPTIONS = {"max_tokens": 60, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def plain(engine):
    return engine.generate(MESSAGES, max_new_tokens=60, ignore_eos=True, drafter="none")


def details(usage):
    found = usage.completion_tokens_details
    return found.accepted_prediction_tokens, found.rejected_prediction_tokens


def test_usage_tells_what_came_of_the_prediction(client, server, plain):
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, prediction={"type": "content", "content": plain.text}, **OPTIONS
    )
    assert tuple(answer.choices[0].model_extra["token_ids"]) == plain.token_ids
    accepted, rejected = details(answer.usage)
    # How much is drafted goes by the latencies that this machine shows; a copy that is right pays everywhere.
    assert 0 < accepted < answer.usage.completion_tokens
    assert rejected >= 0
    assert answer.usage.completion_tokens == len(plain.token_ids)


@pytest.mark.parametrize("content", [[{"type": "text", "text": "abc"}, {"type": "text", "text": "abd"}], "", "xyz"])
def test_parts_nothing_and_other_texts(client, server, plain, content):
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, prediction={"type": "content", "content": content}, **OPTIONS
    )
    assert tuple(answer.choices[0].model_extra["token_ids"]) == plain.token_ids
    if not content:
        assert details(answer.usage) == (0, 0)


def test_streams_choices_and_logprobs(client, server, engine):
    prediction = {"type": "content", "content": "abc abc"}
    sampling = {"max_tokens": 20, "temperature": 0.9, "seed": 3}
    expected = [engine.generate(MESSAGES, max_new_tokens=20, temperature=0.9, seed=3 + place) for place in range(2)]
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, prediction=prediction, n=2, logprobs=True, **sampling
    )
    assert [one.message.content for one in answer.choices] == [one.text for one in expected]
    assert all(one.logprobs.content for one in answer.choices)
    assert min(details(answer.usage)) >= 0
    *steps, last = client.chat.completions.create(
        model=server.name,
        messages=MESSAGES,
        prediction=prediction,
        stream=True,
        stream_options={"include_usage": True},
        **sampling,
    )
    assert "".join(one.choices[0].delta.content or "" for one in steps) == expected[0].text
    assert min(details(last.usage)) >= 0


def test_counts_are_those_of_all_answers():
    one = SimpleNamespace(accepted_prediction_tokens=5, rejected_prediction_tokens=2)
    assert prediction_details([one, one]) == {"accepted_prediction_tokens": 10, "rejected_prediction_tokens": 4}


def test_without_a_prediction_there_are_no_such_counts(client, server):
    answer = client.chat.completions.create(model=server.name, messages=MESSAGES, max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens_details is None
