"""Answers end exactly where they should, whatever blocks their tokens come in."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quasar.text import TextCodec
from runtime.stopping import StopRules

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def codec():
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextCodec(tokenizer, None)


CODEC = codec()


def ids(text):
    return CODEC.encode_text(text)


def run(tokens, sizes, **options):
    """The tokens in blocks; the text, the number of tokens kept, and the last cut."""
    options = {"max_new_tokens": 1000, "stream": CODEC.stream(), **options}
    rules = StopRules(**options)
    pieces, kept, place = [], 0, 0
    cut = None
    for size in itertools.chain(sizes, itertools.repeat(1)):
        if place >= len(tokens):
            rules.end()
            pieces.append(rules.take_text())
            break
        for token in tokens[place : place + size]:
            cut = rules.take(token)
            kept += 1
            if cut.finish_reason:
                break
        place += size
        pieces.append(rules.take_text())
        if cut.finish_reason:
            break
    return SimpleNamespace(text="".join(pieces), kept=kept, cut=cut, pieces=pieces)


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(
    text=st.text(alphabet="abé🙂 ", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="abé🙂 ", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 9), max_size=30),
)
def test_the_text_is_cut_before_the_first_stop_string(text, stops, sizes):
    found = run(ids(text), sizes, stop_strings=tuple(stops))
    # The string that is complete first ends the answer; of those, the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop), order) for order, stop in enumerate(stops) if stop in text]
    # A character's last byte completes every string that ends with it.
    expected = text if not ends else text[: min((end, start) for end, start, _ in ends)[1]]
    assert found.text == expected
    if ends:
        end, _, order = min(ends)
        assert (found.cut.finish_reason, found.cut.stopped_by) == ("stop", stops[order])
        # Tokens up to the one that completed it, and not one more.
        assert found.kept == len(ids(text[:end]))


def test_what_may_become_a_stop_string_waits():
    rules = StopRules(max_new_tokens=99, stop_strings=("END",), stream=CODEC.stream())
    texts = []
    for character in "xEN EEND rest":
        if rules.take(*ids(character)).finish_reason:
            texts.append(rules.take_text())
            break
        texts.append(rules.take_text())
    assert texts == ["x", "", "", "EN ", "", "E", "", ""]


def test_stop_ids_stay_in_the_text_and_end_it():
    tokens = ids("abcabc")
    found = run(tokens, [6], stop_ids=frozenset([tokens[2]]))
    assert (found.kept, found.cut.finish_reason, found.cut.stopped_by, found.text) == (3, "stop", tokens[2], "abc")


def test_length_inside_a_block():
    found = run(ids("abcdef"), [4, 2], max_new_tokens=3)
    assert (found.kept, found.cut.finish_reason, found.text) == (3, "length", "abc")


def test_a_stop_at_the_last_token_is_a_stop():
    tokens = ids("abc")
    assert run(tokens, [3], max_new_tokens=3, stop_ids=frozenset([tokens[2]])).cut.finish_reason == "stop"
    assert run(tokens, [3], max_new_tokens=3, stop_strings=("c",)).cut.finish_reason == "stop"


def test_a_minimum_holds_stop_strings_off():
    found = run(ids("a.b.c.d"), [2, 3, 9], stop_strings=(".",), min_new_tokens=4)
    assert (found.text, found.kept) == ("a.b", 4)
    found = run(ids("a.b.c.d"), [2, 3, 9], stop_strings=(".",), min_new_tokens=5)
    assert found.text == "a.b.c"


def test_half_a_character_at_the_end():
    tokens = ids("a🙂")[:-1]
    assert run(tokens, [9]).text == "a�"
    # After a stop id, too.
    assert run(tokens, [9], stop_ids=frozenset(tokens[-1:])).text == "a�"


def test_a_limit_can_be_lowered_only():
    rules = StopRules(max_new_tokens=5)
    rules.limit(9)
    assert rules.left == 5
    rules.limit(2)
    assert rules.left == 2
    assert rules.take(1).finish_reason is None
    assert rules.take(2).finish_reason == "length"


@pytest.mark.parametrize("string", ["aa", "aba"])
def test_overlapping_beginnings(string):
    for sizes in ([1] * 9, [2] * 9, [9]):
        found = run(ids("xaab" if string == "aa" else "xabcaba"), sizes, stop_strings=(string,))
        assert found.text == ("x" if string == "aa" else "xabc")
