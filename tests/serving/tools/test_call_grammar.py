"""Calls that a grammar makes: where a vocabulary has a token for a marker, the marker is that token."""

import pytest
from tokenizers import AddedToken, Tokenizer

from quasar.text import TextCodec
from quasar.text.chat_template import ChatTemplate
from runtime.grammar.compiler import Grammars
from runtime.grammar.formats import Grammar
from serving.tools.call_formats import HERMES
from serving.tools.call_grammar import call_grammar
from serving.tools.call_support import calls_of
from serving.tools.tool_fields import Tool, ToolUse
from tests.runtime.grammar.vocabulary_states import END, codec
from tests.serving.tools.templates import HERMES_TEMPLATE

OPENER, CLOSER = HERMES.opener, HERMES.closer
CALL = '{"name": "time", "arguments": {}}'
TIME = Tool(place=0, name="time")


@pytest.fixture(scope="module")
def with_markers():
    """A vocabulary in which both markers are tokens that are text, as in those of Qwen's models."""
    tokenizer = Tokenizer.from_str(codec().tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (OPENER, CLOSER)])
    return TextCodec(tokenizer, ChatTemplate(HERMES_TEMPLATE))


def start(codec, *, required=False, parallel=True):
    form, reason = calls_of(codec, "")
    assert reason == ""
    use = ToolUse(shown=(TIME,), callable=(TIME,), required=required, parallel=parallel)
    end, size = codec.tokenizer.token_to_id(END), codec.tokenizer.get_vocab_size()
    state = Grammars(codec, vocab_size=size, end_ids=[end]).start(Grammar(kind="lark", text=call_grammar(use, form)))
    return state, codec.tokenizer.token_to_id(OPENER), codec.tokenizer.token_to_id(CLOSER), end


def take_text(state, codec, text):
    for token in codec.tokenizer.encode(text, add_special_tokens=False).ids:
        assert state.allows(token), codec.tokenizer.id_to_token(token)
        state.take(token)


def spelled(codec, text):
    """The first piece of a marker in other tokens than its own."""
    return codec.tokenizer.encode(text[:2], add_special_tokens=False).ids[0]


def test_a_marker_is_its_token_alone(with_markers):
    state, opener, closer, end = start(with_markers, required=True)
    for _ in range(2):
        assert state.allows(opener)
        assert not state.allows(spelled(with_markers, OPENER))
        state.take(opener)
        take_text(state, with_markers, f"\n{CALL}\n")
        assert state.allows(closer)
        assert not state.allows(spelled(with_markers, CLOSER))
        state.take(closer)
        # It may end here, call again, or end after the new line that comes before either in some models.
        assert state.allows(end)
        take_text(state, with_markers, "\n")
        assert state.allows(end)


def test_a_call_after_text_ends_with_its_token(with_markers):
    state, opener, closer, _ = start(with_markers, parallel=False)
    take_text(state, with_markers, "hello ")
    assert state.allows(opener)
    state.take(opener)
    take_text(state, with_markers, f"\n{CALL}\n")
    assert state.allows(closer)
    assert not state.allows(spelled(with_markers, CLOSER))
    state.take(closer)
    assert state.complete


def test_without_such_tokens_a_marker_is_letters():
    state, opener, _, end = start(TextCodec(codec().tokenizer, ChatTemplate(HERMES_TEMPLATE)), required=True)
    assert opener is None
    take_text(state, codec(), f"{OPENER}\n{CALL}\n{CLOSER}")
    assert state.allows(end)
