"""What `return_rounds` and `drafter` add to OpenAI's API: the rounds of an answer, which stays the same."""

import json
from types import SimpleNamespace

import pytest

from quasar.text.detokenizer import Detokenizer, TextStream
from runtime import Round
from runtime.drafters.named import known_names, names_alone
from serving import responses
from serving.round_objects import RoundObjects, accepted_drafts

MESSAGES = [{"role": "user", "content": "abc abc abc"}]
DRAWN = {"temperature": 0.9, "seed": 7}


def step(tokens, accepted, draft, parents=None):
    return Round(
        tokens=tokens,
        drafted=len(draft),
        accepted=accepted,
        seconds=0.5,
        draft_seconds=0.1,
        finish_reason=None,
        draft_tokens=draft,
        draft_parents=parents,
        width=1 + len(draft),
    )


def streamed(server, path="/v1/chat/completions", **fields):
    """The choices of a stream's chunks."""
    status, text, _ = server.post(path, {"model": server.name, "stream": True, **fields})
    assert status == 200, text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [choice for event in events for choice in json.loads(event)["choices"]]


def test_a_chains_accepted_drafts_come_first():
    assert accepted_drafts(step((5, 6, 9), 2, (5, 6, 7))) == {0, 1}
    assert accepted_drafts(step((9,), 0, (5, 6, 7))) == set()
    # The answer ended with a draft.
    assert accepted_drafts(step((5, 6), 2, (5, 6, 7))) == {0, 1}
    assert accepted_drafts(step((9,), 0, ())) == set()


def test_a_trees_accepted_drafts_are_its_path():
    draft, parents = (5, 6, 7, 7, 8), (-1, -1, 0, 1, 3)
    assert accepted_drafts(step((6, 7, 8, 1), 3, draft, parents)) == {1, 3, 4}
    assert accepted_drafts(step((5, 7, 1), 2, draft, parents)) == {0, 2}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_rounds_are_the_answer(server, engine, sampling):
    expected = engine.generate(MESSAGES, max_new_tokens=60, **sampling)
    fields = {"messages": MESSAGES, "max_tokens": 60, "return_rounds": True, **sampling}
    status, answer = server.chat(**fields)
    assert status == 200
    [choice] = answer["choices"]
    whole = choice["rounds"]
    chunks = streamed(server, **fields)
    for content, rounds in (
        (choice["message"]["content"], whole),
        (
            "".join(one["delta"].get("content", "") for one in chunks),
            [r for one in chunks for r in one.get("rounds", ())],
        ),
    ):
        assert content == expected.text
        assert [token for one in rounds for token in one["token_ids"]] == list(expected.token_ids)
        assert "".join(text for one in rounds for text in one["texts"]) == expected.text
        for one in rounds:
            accepted = [draft for draft in one["drafts"] if draft["accepted"]]
            assert [draft["token_id"] for draft in accepted] == one["token_ids"][: one["accepted"]]
            assert len(one["texts"]) == len(one["token_ids"])
            assert 0 <= one["draft_seconds"] <= one["seconds"]
            assert one["width"] >= 1 + len(one["drafts"]) or one is rounds[0]
            assert (one["drafter"] == "none") == (not one["drafts"])
        assert rounds[0]["drafts"] == []


def test_objects_of_an_engines_rounds(engine):
    """Drafts from a text that is the answer but for every seventh token: some are accepted and some are not."""
    plain = engine.generate(MESSAGES, max_new_tokens=60, drafter="none").token_ids
    text = [200 + place if place % 7 == 6 else token for place, token in enumerate(plain)]
    options = {"max_new_tokens": 60, "prediction": text, "drafter": "prediction", "num_draft_tokens": 4}
    events = list(engine.stream(MESSAGES, **options))
    objects = RoundObjects(engine.codec, continues=False)
    made = [objects.of(one.round) for one in events]
    assert "".join(text for one in made for text in one["texts"]) == "".join(one.text for one in events)
    for one, event in zip(made, events, strict=True):
        accepted = tuple(draft["token_id"] for draft in one["drafts"] if draft["accepted"])
        assert accepted == event.token_ids[: event.accepted]
        assert len(one["drafts"]) == event.drafted
    drafts = [draft["accepted"] for one in made for draft in one["drafts"]]
    assert {True, False} == set(drafts)
    assert {one["drafter"] for one in made} <= {"none", "prediction"}


def test_rounds_of_completions_and_of_each_choice(server, engine):
    fields = {"prompt": "one two one two", "max_tokens": 24, "n": 2, "return_rounds": True, **DRAWN}
    _, answer = server.completion(**fields)
    chunks = streamed(server, "/v1/completions", **fields)
    for choice in answer["choices"]:
        texts = [text for one in choice["rounds"] for text in one["texts"]]
        assert "".join(texts) == choice["text"]
        mine = [one for one in chunks if one["index"] == choice["index"]]
        assert [text for one in mine for made in one["rounds"] for text in made["texts"]] == texts


def test_rounds_come_only_where_they_are_asked_for(server):
    _, answer = server.chat()
    assert "rounds" not in answer["choices"][0]
    assert all("rounds" not in one for one in streamed(server, messages=MESSAGES, max_tokens=4))


def test_a_character_of_several_tokens_stands_at_its_last_one(tiny_model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))

    class Codec:
        detokenizer = Detokenizer(tokenizer)

        def __init__(self):
            self.tokenizer = tokenizer

        def stream(self, *, continues):
            return TextStream(self.detokenizer, continues=continues)

    ids = [
        next(token for token in range(300) if Codec.detokenizer.token_bytes(token) == bytes([byte]))
        for byte in "ö".encode()
    ]
    made = RoundObjects(Codec(), continues=True).of(step(tuple(ids), 1, (ids[0], ids[0])))
    assert made["texts"] == ["", "ö"]
    assert [(one["text"], one["parent"], one["accepted"]) for one in made["drafts"]] == [
        ("\ufffd", -1, True),
        ("\ufffd", 0, False),
    ]


@pytest.mark.parametrize("drafter", ["none", "auto", "suffix", "prompt-lookup", "suffix,recycling"])
def test_no_drafter_changes_the_answer(server, engine, drafter):
    expected = engine.generate(MESSAGES, max_new_tokens=40, **DRAWN)
    status, answer = server.chat(messages=MESSAGES, max_tokens=40, drafter=drafter, return_rounds=True, **DRAWN)
    assert status == 200
    [choice] = answer["choices"]
    assert choice["message"]["content"] == expected.text
    if drafter == "none":
        assert not any(one["drafts"] for one in choice["rounds"])


@pytest.mark.parametrize(
    "drafter",
    ["self:/etc", "model", "hierarchical:.", "recycling:kept", "suffix,model:x", "nobody", "", 3, "none,suffix"],
)
def test_drafters_that_cannot_be_asked_for(server, drafter):
    status, answer = server.chat(drafter=drafter)
    assert (status, answer["error"]["param"]) == (400, "drafter")


def test_the_model_tells_its_drafters(server):
    _, listed, _ = server.request("GET", "/v1/models")
    assert listed["data"][0]["drafters"] == ["auto", "none", "prompt-lookup", "suffix", "recycling", "prediction"]
    assert set(known_names()) - set(names_alone()) == {"model", "self", "hierarchical"}


@pytest.mark.parametrize(
    ("chat", "options", "continues"),
    [
        (True, {}, False),
        (True, {"continue_final_message": True}, True),
        (True, {"response_format": {"type": "regex", "regex": "a"}}, True),
        (False, {}, True),
    ],
)
def test_a_space_that_an_answer_begins_with_is_its_own_where_it_goes_on(chat, options, continues):
    """As the runtime has it (runtime.request): tokenizers of words take the first space of a text away."""
    asked = []
    codec = SimpleNamespace(stream=lambda *, continues: asked.append(continues))
    responses._round_objects(SimpleNamespace(chat=chat, options=options), codec)
    assert asked == [continues]
