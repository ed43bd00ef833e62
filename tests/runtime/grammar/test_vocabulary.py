"""The bytes of every token, and texts cut into tokens, for tokenizers of every kind."""

import pytest

from quasar.text import TextCodec
from runtime.grammar.vocabulary import Vocabulary
from tests.vocabularies import KINDS


def vocabulary(kind, more=5):
    codec = TextCodec(KINDS[kind](), None)
    size = codec.tokenizer.get_vocab_size()
    end = codec.tokenizer.token_to_id("</s>")
    return codec, Vocabulary(codec, vocab_size=size + more, end_ids=[end])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_bytes_of_their_text(kind):
    codec, found = vocabulary(kind)
    special = {codec.tokenizer.token_to_id(name): name for name in ("<s>", "</s>", "<|im_end|>")}
    for token in range(codec.tokenizer.get_vocab_size()):
        if token in special:
            assert found.tokens[token] == b"\xff" + special[token].encode()
        else:
            assert found.tokens[token] == codec.detokenizer.token_bytes(token)
    # Ids of the model that the tokenizer has no token for.
    assert found.tokens[-5:] == [b""] * 5
    assert found.tokens[codec.tokenizer.token_to_id("<tool>")] == b"<tool>"
    assert found.eos_token_id == codec.tokenizer.token_to_id("</s>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a", " a", " the he.", "ab  b", "好 é", "</s>", '{"a": 1}', "", "\n a", "<tool>"])
def test_a_text_is_spelled_byte_by_byte(kind, text):
    _, found = vocabulary(kind)
    try:
        ids = found(text)
    except ValueError:
        # A vocabulary of pieces has no bytes for other characters.
        assert kind == "SentencePiece"
        assert set(text) - set(" ab好é🙂\nthe.")
        return
    assert b"".join(found.tokens[token] for token in ids) == text.encode()
    assert not any(found.tokens[token].startswith(b"\xff") for token in ids)


def test_a_piece_inside_of_a_text_has_no_space_before_it():
    """As the tokenizer spells it after other text: not character by character."""
    codec, found = vocabulary("byte-fallback")
    assert [codec.tokenizer.id_to_token(token) for token in found("a b")] == ["a", "▁", "b"]


def test_an_end_id_is_no_text_whatever_it_spells():
    codec = TextCodec(KINDS["byte-level"](), None)
    end = codec.tokenizer.token_to_id("a")
    assert Vocabulary(codec, vocab_size=300, end_ids=[end]).tokens[end] == b"\xffa"
    assert Vocabulary(codec, vocab_size=300, end_ids=[]).eos_token_id is None
