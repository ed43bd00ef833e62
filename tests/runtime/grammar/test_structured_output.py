"""Answers under a grammar from a tiny random engine: valid, the same with and without drafts, alone and together."""

import asyncio
import json
import re
import subprocess
import sys
import threading

import jsonschema
import numpy as np
import pytest

import runtime
from benchmarks.structured_schemas import random_schema
from quasar.errors import GrammarError
from runtime.drafters import Draft
from tests.commands import command

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "kind": {"enum": ["alpha beta", "alphabet", "gamma"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "list"],
    "additionalProperties": False,
}
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
REGEX = r"(hello world|hello there|goodbye), [0-9]{2,6} times!"
FORMATS = {
    "schema": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    "compact": {"type": "json_schema", "json_schema": {"name": "s", "schema": {**SCHEMA, **COMPACT}}},
    "object": {"type": "json_object"},
    "regex": {"type": "regex", "regex": REGEX},
    "grammar": {"type": "grammar", "grammar": 'start: "it is " ("so" | "not so" | start) "."'},
}
CHOICES = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 5},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 3},
    "changed": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": {44: 1.0},
        "min_new_tokens": 5,
        "logprobs": 2,
    },
}
DRAFTERS = {
    "auto": {},
    "suffix": {"drafter": "suffix", "num_draft_tokens": 5},
    "prompt-lookup": {"drafter": "prompt-lookup"},
    "recycling": {"drafter": "recycling", "num_draft_tokens": 8},
    "several": {"drafter": "suffix,prompt-lookup,recycling", "num_draft_tokens": 6},
}
PROMPT = '{"name": "abab", "kind": "alpha beta", "list": [true, false]} hello world, hello there'


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine, max_sequences=4) as loaded:
        yield loaded


def ask(engine, name, prompt=PROMPT, **options):
    return engine.generate(prompt, response_format=FORMATS[name], **{"max_new_tokens": 200, **options})


def check(name, answer):
    """What ends with "stop" is what was asked for."""
    if answer.finish_reason != "stop":
        assert answer.finish_reason == "length"
        return
    if name == "regex":
        assert re.fullmatch(REGEX, answer.text)
    elif name == "grammar":
        assert re.fullmatch(r"(it is )+(not so|so)\.+", answer.text)
    else:
        jsonschema.validate(json.loads(answer.text), {} if name == "object" else SCHEMA)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_the_same_with_any_drafter(engine, name, choice):
    plain = ask(engine, name, drafter="none", **CHOICES[choice])
    check(name, plain)
    assert plain.stats.drafted == 0
    for drafter in DRAFTERS.values():
        drafted = ask(engine, name, **CHOICES[choice], **drafter)
        assert drafted.token_ids == plain.token_ids
        assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
        assert drafted.logprobs == plain.logprobs


def test_what_is_tested_ends_and_takes_drafts(engine):
    """Else the test above would show little."""
    for name in ("compact", "regex"):
        drafted = ask(engine, name)
        assert drafted.finish_reason == "stop"
        assert drafted.stopped_by is None
        assert drafted.stats.accepted > 0
        assert drafted.stats.rounds < drafted.stats.tokens - 1


class Wrong:
    """Tokens that the grammar forbids, and tokens that it allows and nobody chooses: as a tree."""

    def __init__(self):
        self.random = np.random.default_rng(3)

    def propose(self, context, max_tokens):
        count = min(max_tokens, 7)
        tokens = self.random.permutation(np.arange(256))[:count]
        return Draft(
            tokens=tokens.astype(np.int64),
            parents=np.array([self.random.integers(-1, place) for place in range(count)], np.int64),
        )


@pytest.mark.parametrize("choice", CHOICES)
def test_random_trees_change_nothing(engine, choice):
    plain = ask(engine, "schema", drafter="none", **CHOICES[choice])
    assert ask(engine, "schema", drafter=Wrong(), num_draft_tokens=7, **CHOICES[choice]).token_ids == plain.token_ids


def test_the_greedy_token_is_that_of_a_mask_over_all_logits(engine):
    """With log-probabilities tokens come from masked logits; without, from the graph's likeliest ones."""
    for name in FORMATS:
        for prompt in (PROMPT, "one two one two", "abc"):
            assert ask(engine, name, prompt).token_ids == ask(engine, name, prompt, logprobs=0).token_ids


def test_forced_tokens_are_accepted_whatever_the_model_says(engine):
    answer = engine.generate(
        PROMPT, response_format={"type": "regex", "regex": "forced words that nobody would say[ab]"}, drafter="suffix"
    )
    assert answer.text[:-1] == "forced words that nobody would say"
    assert answer.stats.accepted == answer.stats.drafted > 20
    assert answer.stats.rounds < 6


@pytest.mark.parametrize("greedy", [True, False])
def test_together_as_alone(engine, greedy):
    """Four at a time, some of them without a grammar: in passes that they share."""
    requests = [
        {"prompt": f"{PROMPT} {place}", "max_new_tokens": 80, **({} if greedy else {"temperature": 1.0, "seed": place})}
        for place in range(12)
    ]
    kinds = [*FORMATS, None]
    for place, request in enumerate(requests):
        if (name := kinds[place % len(kinds)]) is not None:
            request["response_format"] = FORMATS[name]
    alone = [engine.generate(**request, drafter="none").token_ids for request in requests]
    passes = engine.metrics().passes
    together = [None] * len(requests)

    def run(first):
        for place in range(first, len(requests), 4):
            together[place] = engine.generate(**requests[place]).token_ids

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert engine.metrics().passes - passes < sum(map(len, alone))
    assert engine.metrics().sequences_per_pass.get(4, 0) > 5


def test_many_prompts_and_streams_and_conversations(engine):
    options = {"response_format": FORMATS["compact"], "max_new_tokens": 100}
    alone = [engine.generate(prompt, drafter="none", **options) for prompt in (PROMPT, "abc")]
    assert [one.text for one in engine.generate([PROMPT, "abc"], **options)] == [one.text for one in alone]
    assert "".join(event.text for event in engine.stream(PROMPT, **options)) == alone[0].text
    assert asyncio.run(engine.agenerate(PROMPT, **options)).text == alone[0].text
    with engine.session() as conversation:
        first = conversation.generate(PROMPT, **options)
        assert first.text == alone[0].text
        second = conversation.generate("again", **options)
        assert second.text == engine.generate(list(conversation.messages[:-1]), drafter="none", **options).text


@pytest.mark.parametrize("seed", range(30))
def test_random_schemas(engine, seed):
    schema = {**random_schema(seed, depth=2), **COMPACT}
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "max_new_tokens": 250}
    for choice in ({}, {"temperature": 1.0, "seed": seed}):
        plain = engine.generate(PROMPT, drafter="none", **asked, **choice)
        assert engine.generate(PROMPT, **asked, **choice).token_ids == plain.token_ids
        assert plain.finish_reason == "stop"
        jsonschema.validate(json.loads(plain.text), schema)


def test_logprobs_are_the_models_own(engine):
    """Those of the same context without a grammar: the first token that the grammar chose may be an unlikely one."""
    free = engine.generate(PROMPT, logprobs=100, max_new_tokens=1)
    guided = ask(engine, "regex", logprobs=100, max_new_tokens=1)
    assert guided.logprobs[0].top == free.logprobs[0].top
    assert guided.logprobs[0].token_id in (ord("h"), ord("g")) or guided.text in ("h", "g")


def test_a_hook_keeps_its_own_array_and_cannot_undo_the_grammar(engine):
    mine = np.zeros(engine.manifest.contract.vocab_size, np.float32)
    mine[engine.codec.tokenizer.token_to_id("#")] = 50.0
    answer = ask(engine, "regex", logits_processor=lambda context, logits: mine)
    assert re.fullmatch(REGEX, answer.text)
    assert sorted(np.unique(mine).tolist()) == [0.0, 50.0]


def test_ends(engine):
    end = engine.manifest.text.eos_token_ids[0]
    digits = {"type": "regex", "regex": "[0-9]+"}
    bias = {"logit_bias": {end: 100.0}}
    answer = engine.generate(PROMPT, response_format=digits, **bias)
    # The end id is taken as soon as it may come, and not before.
    assert re.fullmatch("[0-9]", answer.text)
    assert (answer.finish_reason, answer.stopped_by) == ("stop", end)
    answer = engine.generate(PROMPT, response_format=digits, min_new_tokens=5, **bias)
    assert re.fullmatch("[0-9]{5}", answer.text)
    # A grammar that leaves nothing else ends an answer before its minimum.
    answer = engine.generate(PROMPT, response_format={"type": "regex", "regex": "abc"}, min_new_tokens=9)
    assert (answer.text, answer.finish_reason, answer.stopped_by) == ("abc", "stop", None)
    # Stop strings and other special tokens end it, too: the latter where the grammar may end.
    answer = engine.generate(PROMPT, response_format={"type": "regex", "regex": "abcabc"}, stop="ca")
    assert (answer.text, answer.stopped_by) == ("ab", "ca")
    user = engine.codec.tokenizer.token_to_id("<|user|>")
    answer = engine.generate(PROMPT, response_format=digits, stop_token_ids=[user], logit_bias={user: 100.0})
    assert re.fullmatch("[0-9]", answer.text)
    assert answer.stopped_by == user
    answer = engine.generate(PROMPT, response_format=digits, max_new_tokens=1)
    assert answer.finish_reason == "length"


def test_an_answer_keeps_the_space_that_it_begins_with(engine):
    assert engine.generate(PROMPT, response_format={"type": "regex", "regex": "  a"}).text == "  a"


def test_a_grammar_that_goes_too_far_ends_its_own_request_alone(engine):
    ambiguous = {"type": "grammar", "grammar": 'start: a\na: a a | "x"'}
    other = engine.generate("abc", max_new_tokens=60, drafter="none").token_ids
    end = engine.manifest.text.eos_token_ids[0]
    bad = engine.stream(PROMPT, response_format=ambiguous, max_new_tokens=300, logit_bias={end: -np.inf})
    good = engine.stream("abc", max_new_tokens=60)
    found = list(next(good).token_ids)

    def read():
        for _ in bad:
            pass

    with pytest.raises(GrammarError, match="response_format went beyond its limits after"):
        read()
    for event in good:
        found += event.token_ids
    assert found == list(other)


def test_a_grammar_is_compiled_in_the_callers_thread(engine, monkeypatch):
    """And not in the thread that makes the passes; what cannot be compiled is said before anything runs."""
    grammars = engine._resources.grammars
    threads, compile_one = [], grammars._compile
    monkeypatch.setattr(
        grammars, "_compile", lambda grammar: threads.append(threading.get_ident()) or compile_one(grammar)
    )
    events = engine.stream(PROMPT, response_format={"type": "regex", "regex": "only here"})
    assert threads == [threading.get_ident()]
    assert "".join(event.text for event in events) == "only here"
    with pytest.raises(GrammarError, match=r"response_format cannot be compiled: .*invalid regex"):
        engine.stream(PROMPT, response_format={"type": "regex", "regex": "(a"})


def test_without_llguidance_the_extra_is_named(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'quasar-verifier\[structured\]'"):
        engine.stream(PROMPT, response_format={"type": "regex", "regex": "never seen before"})


def test_llguidance_is_imported_for_the_first_grammar(tiny_engine):
    code = f"import runtime, sys; e = runtime.load({str(tiny_engine)!r}); e.generate('hi', max_new_tokens=4)"
    last = "e.generate('hi', response_format={'type': 'regex', 'regex': 'a'})"
    shown = "print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}; {shown}; {last}; {shown}"], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_on_the_command_line(tiny_engine, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({**SCHEMA, **COMPACT}))
    generate = ("runtime", "generate", tiny_engine, PROMPT, "--json-schema", path)
    done = command(*generate)
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), SCHEMA)
    path.write_text("[]")
    done = command(*generate)
    assert done.returncode == 2
    assert "schema.json holds a list; a JSON schema, an object, was expected" in done.stderr
