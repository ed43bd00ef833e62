"""What may come next, against walks over every token; drafts against their paths followed one by one; limits."""

import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from quasar.errors import GrammarError
from runtime.drafters import Draft
from runtime.grammar.compiler import Grammars
from runtime.grammar.formats import Grammar
from tests.runtime.grammar.vocabulary_states import END, OTHER, codec, encode, grammars, start, token, vocab_size

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name"],
    "additionalProperties": False,
}
CASES = {
    "schema": ("json_schema", json.dumps(SCHEMA)),
    "compact": ("json_schema", json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})),
    "regex": ("regex", r"(hello world|hello there|goodbye), [0-9]{1,3}( times)?"),
    "grammar": ("lark", 'start: "the answer is " ("yes" | "no") "."*'),
}


def text_of(tokens):
    return b"".join(codec().detokenizer.token_bytes(one) for one in tokens).decode()


def allowed_by_mask(state):
    logits = np.zeros(vocab_size(), np.float32)
    state.mask(logits)
    assert set(np.unique(logits).tolist()) <= {0.0, -np.inf}
    return set(np.flatnonzero(logits == 0).tolist())


def walk(case, seed, steps=60):
    """States along a random answer, each with the tokens before it."""
    state, taken, rng = start(*CASES[case], other_ends=[token(OTHER)]), [], random.Random(seed)
    for _ in range(steps):
        yield state, taken
        if state.complete:
            return
        # An end id now and then, where it may come.
        tokens = sorted(allowed_by_mask(state) - {token(OTHER), *([token(END)] if rng.random() < 0.7 else [])})
        taken = [*taken, rng.choice(tokens or [token(END)])]
        state.take(taken[-1])


def test_what_a_round_s_drafts_take_is_one_sum(monkeypatch):
    """Each look takes a hundredth of a second; two in a round are still followed, and a third is not."""
    moments = iter(0.0095 * (place // 2 + place % 2) for place in range(100))
    monkeypatch.setattr("runtime.grammar.matcher.time.thread_time", lambda: next(moments))
    state = start(*CASES["regex"])
    digits = encode("hello world, ")
    for one in digits:
        state.take(one)
    number = encode("1")[0]
    for _ in range(2):
        # A token that is taken begins another sum.
        assert [state.permits([], [number]) for _ in range(2)] == [[True], [True]]
        state.take(number)
    assert [state.permits([], [number]) for _ in range(4)] == [[True], [True], [True], [False]]


def test_tokens_after_a_path_are_permitted_as_in_a_walk():
    state = start(*CASES["grammar"])
    path = encode("the answer is ")
    yes, no, other = (encode(text)[0] for text in ("yes", "no", "hello"))
    assert state.permits(path, [yes, no, other]) == [True, True, False]
    for one in path:
        state.take(one)
    assert state.permits([], [yes, no, other]) == [True, True, False]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_is_what_single_tokens_say(case, seed):
    ends = {token(END), token(OTHER)}
    accepted = refused = False
    for state, taken in walk(case, seed):
        if state.complete:
            assert taken
            break
        allowed = allowed_by_mask(state)
        assert allowed == {one for one in range(vocab_size()) if state.allows(one)}
        if forced := state.forced():
            assert allowed == {forced[0]}
        # All end ids come at the same places.
        assert not ends & allowed or ends <= allowed
        accepted, refused = accepted or ends <= allowed, refused or not ends & allowed
        # What was asked changes nothing.
        other = start(*CASES[case], other_ends=[token(OTHER)])
        for one in taken:
            other.take(one)
        assert other.forced() == state.forced()
    assert refused
    # An object is complete where it may end.
    assert accepted == (case in ("regex", "grammar"))


@pytest.mark.parametrize("seed", range(5))
def test_answers_along_a_mask_match(seed):
    *_, (state, taken) = walk("regex", seed)
    assert state.complete
    assert re.fullmatch(CASES["regex"][1], text_of([one for one in taken if one != token(END)]))


def test_forced_tokens_are_known_together_and_stay_what_they_were():
    state = start("lark", 'start: "the answer is " ("yes" | "no") "."')
    forced = state.forced()
    assert len(forced) > 2
    assert "the answer is ".startswith(text_of(forced))
    for place, one in enumerate(forced):
        assert state.forced() == forced[place:]
        assert allowed_by_mask(state) == {one}
        assert not state.allows(encode("x")[0])
        state.take(one)
    assert len(allowed_by_mask(state)) > 1


def test_a_complete_answer_needs_no_end_id():
    state = start("regex", "[ab]c")
    for letter in "bc":
        assert not state.complete
        state.take(encode(letter)[0])
    assert state.complete


def test_without_end_ids_an_answer_ends_where_nothing_can_follow():
    own = Grammars(codec(), vocab_size=vocab_size(), end_ids=[])
    state = own.start(Grammar(kind="regex", text="[ab]c?"))
    state.take(encode("a")[0])
    assert allowed_by_mask(state) == {encode("c")[0]}
    assert not state.complete
    state.take(encode("c")[0])
    assert state.complete


def follows(case, before, path):
    """How many tokens of a path may come: a state of its own, token by token."""
    state = start(*CASES[case])
    for one in before:
        state.take(one)
    for place, one in enumerate(path):
        # Every spelling of what is forced is let through: that it does not come shows in the choice.
        if state.complete or state._matcher.validate_tokens([one]) != 1:
            return place
        state._matcher.consume_token(one)
    return len(path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_drafts_are_pruned_to_what_may_come(case, seed):
    rng = random.Random(seed)
    cut = whole = 0
    for state, taken in walk(case, seed, steps=12):
        after = state.forced()
        answer = encode(
            {"schema": '{"name": "a", "age": 3}', "compact": '{"name":"a","age":3}'}.get(case, "hello world, 5")
        )
        tokens, parents = [], []
        for place in range(12):
            parents.append(rng.randrange(-1, place))
            pool = answer + sorted(allowed_by_mask(state))[:3]
            siblings = {one for one, parent in zip(tokens, parents, strict=False) if parent == parents[-1]}
            tokens.append(rng.choice([one for one in pool if one not in siblings] or [rng.randrange(300)]))
        tree = Draft(tokens=np.array(tokens), parents=np.array(parents), evidence=np.arange(12))
        paths = []
        for one, parent in zip(tokens, parents, strict=True):
            paths.append([*(paths[parent] if parent >= 0 else []), one])
        expected = [
            place for place, path in enumerate(paths) if follows(case, taken, [*after, *path]) == len(after) + len(path)
        ]
        found = state.prune(tree, after=after)
        kept = [] if found.evidence is None else found.evidence.tolist()
        assert kept == expected
        assert found.tokens.tolist() == [tokens[place] for place in expected]
        if kept:
            assert [-1 if parent < 0 else kept[parent] for parent in found.parents] == [
                parents[place] for place in kept
            ]
        chain = state.prune(Draft(tokens=np.array(tokens)), after=after)
        length = max(0, follows(case, taken, [*after, *tokens]) - len(after))
        assert (chain.tokens.tolist(), chain.parents) == (tokens[:length], None)
        cut, whole = cut + (len(kept) < 12), whole + bool(kept)
    assert cut
    assert whole


def test_drafts_outside_the_vocabulary_are_left_to_who_checks_them():
    state = start(*CASES["schema"])
    for bad in (-1, vocab_size()):
        assert state.prune(Draft(tokens=np.array([bad])), after=[]).tokens.tolist() == [bad]


REFUSED = {
    "syntax": ("regex", "(a", "invalid regex"),
    "look-ahead": ("regex", "a(?=b)", "look-around"),
    "deep expression": ("regex", "(" * 5000 + "a" + ")" * 5000, "invalid regex"),
    "deep grammar": ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
    "no rule": ("lark", "start: x", "x"),
    "long rules": (
        "lark",
        "\n".join(
            [f"start: {' '.join(f'r{n}' for n in range(2000))}", *(f'r{n}: r{n + 1} | "a" | ' for n in range(2000))]
        )
        + '\nr2000: "x"',
        "Too many items|items; max",
    ),
    "unknown keyword": ("json_schema", '{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
    "nothing fits": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}', "Unsatisfiable schema|range"),
    "remote": ("json_schema", '{"$ref": "https://example.com/x"}', "Resource"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_with_a_reason(case):
    kind, text, reason = REFUSED[case]
    with pytest.raises(GrammarError, match=rf"response_format cannot be compiled: .*({reason})") as refused:
        start(kind, text)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


# Every step adds items to a row: it ends in its limit after some tokens.
AMBIGUOUS = 'start: a\na: a a | "x"'


def exhausted():
    state, logits = start("lark", AMBIGUOUS), np.zeros(vocab_size(), np.float32)

    def go_on():
        while True:
            state.mask(logits)
            state.take(encode("x")[0])

    with pytest.raises(GrammarError, match=r"response_format went beyond its limits after \d\d+ tokens") as error:
        go_on()
    return str(error.value)


def test_a_grammar_that_goes_too_far_ends_there_every_time():
    assert exhausted() == exhausted()


class Broken:
    """A matcher that has come to its limits."""

    def __getattr__(self, name):
        return lambda *arguments: 0 if name == "validate_tokens" else name == "is_error" or b""


def test_what_another_answer_used_up_is_made_anew():
    """Copies share an automaton: one whose error is not its own is asked again alone."""
    grammar = Grammar(kind="regex", text="[ab]{1,5}c")
    own = Grammars(codec(), vocab_size=vocab_size(), end_ids=[token(END)])
    state = own.start(grammar)
    state.take(encode("a")[0])
    before = allowed_by_mask(state)
    state._matcher = Broken()
    assert allowed_by_mask(state) == before
    assert not isinstance(state._matcher, Broken)


def test_a_draft_that_goes_too_far_is_no_error():
    state, x = start("lark", AMBIGUOUS), encode("x")[0]
    state.take(x)
    before, draft = allowed_by_mask(state), Draft(tokens=np.array([x, x]))
    state._matcher = Broken()
    assert len(state.prune(draft, after=[]).tokens) == 0
    assert allowed_by_mask(state) == before == {x, token(END)}
    assert len(state.prune(draft, after=[]).tokens) == 2


def test_drafts_that_take_too_long_to_follow_come_no_more(monkeypatch):
    """Whatever they take, the choice of tokens stays as it was."""
    state, x = start("lark", AMBIGUOUS), encode("x")[0]
    draft = Draft(tokens=np.full(31, x))
    assert len(state.prune(draft, after=[]).tokens) == 31
    monkeypatch.setattr("runtime.grammar.matcher._SLOW_SECONDS", 0.0)
    assert len(state.prune(draft, after=[]).tokens) == 31
    monkeypatch.undo()
    assert len(state.prune(draft, after=[]).tokens) == 0
    assert state.allows(x)


def test_compiled_grammars_are_kept_and_the_oldest_goes(monkeypatch):
    own = Grammars(codec(), vocab_size=vocab_size(), end_ids=[token(END)])
    made = []
    compile_one = own._compile
    monkeypatch.setattr(own, "_compile", lambda grammar: made.append(grammar.text) or compile_one(grammar))
    monkeypatch.setattr("runtime.grammar.compiler._KEPT", 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        own.start(Grammar(kind="regex", text=text))
    assert made == ["a", "b", "c", "b"]


def test_answers_that_begin_together_compile_their_grammar_once(monkeypatch):
    own = Grammars(codec(), vocab_size=vocab_size(), end_ids=[token(END)])
    made, compile_one = [], own._compile

    def slow(grammar):
        made.append(grammar.text)
        time.sleep(0.05)
        return compile_one(grammar)

    monkeypatch.setattr(own, "_compile", slow)
    grammar = Grammar(kind="regex", text="ab?c")
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(lambda _: own.start(grammar), range(4)))
    assert made == ["ab?c"]
    assert len({id(state) for state in states}) == 4
    # So do those that fail.
    broken = Grammar(kind="regex", text="a(")
    with ThreadPoolExecutor(4) as pool:
        failed = [pool.submit(own.start, broken) for _ in range(4)]
    assert all(isinstance(one.exception(), GrammarError) for one in failed)
    assert made == ["ab?c", "a("]
    # What cannot be compiled is said to each, and forgotten.
    for _ in range(2):
        with pytest.raises(GrammarError):
            own.start(Grammar(kind="regex", text="a("))
    assert not own._compiling


def test_threads_start_grammars_together():
    """One tokenizer, and states that do not disturb each other."""
    own = Grammars(codec(), vocab_size=vocab_size(), end_ids=[token(END)])
    found = [None] * 8

    def run(place):
        state = own.start(Grammar(kind="regex", text="(ab|ac)d{3}"))
        for letter in "ab" if place % 2 else "ac":
            state.take(encode(letter)[0])
        found[place] = state.forced()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(one) for one in found}) == 1
    assert text_of(found[0]).startswith("d")


def test_the_tokenizer_is_made_once():
    assert grammars()._open_tokenizer() is grammars()._open_tokenizer()
