"""The option `prediction` on a tiny engine: the same tokens as without it, and counts of what came from it."""

import json

import pytest

import runtime
from quasar.errors import GenerationError

PROMPT = "abc abd abc abd. abc abd"
CHOICES = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "changed": {"repetition_penalty": 1.2, "min_new_tokens": 5, "logprobs": 2},
}
COUNT = 60


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine, threads=1, max_sequences=4) as loaded:
        yield loaded


def ask(engine, **options):
    return engine.generate(PROMPT, max_new_tokens=COUNT, ignore_eos=True, **options)


def predictions(answer):
    """Token ids that resemble an answer, or not."""
    ids = list(answer.token_ids)
    edited = [*ids[:9], 40, 41, *ids[9:20], *ids[26:40], 50, *ids[41:]]
    return {
        "right": ids,
        "edited": edited,
        "empty": [],
        "wrong": [33] * 50,
        "huge": [34, 35, 36] * 40_000 + ids,
        "later": ids[10:],
        "short": ids[:7],
    }


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("drafter", [{}, {"drafter": "prediction"}, {"drafter": "prediction", "num_draft_tokens": 6}])
def test_the_tokens_are_those_of_plain_decoding(engine, choice, drafter):
    plain = ask(engine, drafter="none", **CHOICES[choice])
    for name, prediction in predictions(plain).items():
        answer = ask(engine, prediction=prediction, **drafter, **CHOICES[choice])
        assert (answer.token_ids, answer.logprobs) == (plain.token_ids, plain.logprobs), name
        stats = answer.stats
        assert sum(one.drafted for one in stats.sources) == stats.drafted
        assert sum(one.accepted for one in stats.sources) == stats.accepted
        if name in ("empty", "wrong"):
            assert not stats.accepted_prediction_tokens or 33 in plain.token_ids
    if drafter.get("num_draft_tokens"):
        right = ask(engine, prediction=predictions(plain)["right"], **drafter, **CHOICES[choice]).stats
        # Six drafts and the target's own token in every round after the first token.
        assert right.accepted_prediction_tokens == right.accepted >= (COUNT - 1) * 6 // 7 - 6
        assert right.rejected_prediction_tokens == 0
        assert right.to_json()["accepted_prediction_tokens"] == right.accepted


def test_in_batches_each_gets_what_it_gets_alone(engine):
    prompts = [f"{place} {PROMPT}" for place in range(6)]
    options = {"max_new_tokens": COUNT, "ignore_eos": True}
    alone = [engine.generate(prompt, drafter="none", **options) for prompt in prompts]
    for one in alone[:3]:
        together = engine.generate(prompts, prediction=list(one.token_ids), **options)
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    # Each with its own, begun together.
    streams = [
        engine.stream(prompt, prediction=list(one.token_ids), **options)
        for prompt, one in zip(prompts, alone, strict=True)
    ]
    found = [[] for _ in streams]
    going = dict(enumerate(streams))
    while going:
        for place, stream in list(going.items()):
            event = next(stream, None)
            if event is None:
                del going[place]
            else:
                found[place] += event.token_ids
    assert [tuple(ids) for ids in found] == [answer.token_ids for answer in alone]


def test_a_text_is_tokenized_as_an_answer(engine):
    plain = ask(engine, drafter="none")
    drafted = ask(engine, prediction=plain.text, drafter="prediction", num_draft_tokens=6)
    assert drafted.token_ids == plain.token_ids
    # A marker in the text is text.
    assert ask(engine, prediction="<|end|>" + plain.text).token_ids == plain.token_ids
    text = engine.generate(PROMPT, max_new_tokens=20, chat_template=False)
    again = engine.generate(PROMPT, max_new_tokens=20, chat_template=False, prediction=text.text)
    assert again.token_ids == text.token_ids


def test_under_a_grammar(engine):
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": [["alpha", "beta"], ["alpha", "gamma"]]}}}
    plain = engine.generate(PROMPT, response_format=form, drafter="none")
    for predicted in (plain.text, json.dumps(["alpha", "delta"]), "no JSON"):
        answer = engine.generate(PROMPT, response_format=form, prediction=predicted)
        assert answer.token_ids == plain.token_ids


def test_in_conversations(engine):
    with engine.session() as conversation:
        first = conversation.generate(PROMPT, max_new_tokens=20)
    with engine.session() as conversation:
        assert conversation.generate(PROMPT, max_new_tokens=20, prediction=first.text).token_ids == first.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": 3}, "a text, or token ids, were expected"),
        ({"prediction": ["a"]}, "a text, or token ids, were expected"),
        ({"prediction": [10**6]}, "prediction names the token id 1000000, outside the vocabulary"),
        ({"prediction": "x", "drafter": "none"}, "prediction came with the drafter 'none'"),
        ({"drafter": "prediction"}, "give it as prediction"),
        ({"drafter": "prediction:3", "prediction": "x"}, "takes nothing after a colon"),
    ],
)
def test_what_cannot_be_honoured(engine, options, message):
    with pytest.raises(GenerationError, match=message):
        engine.generate(PROMPT, **options)
