"""Streams of text: whatever the tokens are, no exception, whole characters, and the pieces are the whole."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from quasar.text import TextCodec
from quasar.text.detokenizer import UnknownDecoderError
from tests.vocabularies import KINDS, byte_fallback, sentencepiece

SEQUENCES = 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_stream_to_the_whole_text(kind):
    """Ids past the vocabulary and special ones are among them; blocks are of random sizes; half go on from a text."""
    tokenizer = KINDS[kind]()
    codec = TextCodec(tokenizer, None)
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, SEQUENCES)
    cuts = random.integers(0, lengths + 1).tolist()
    tokens = random.integers(0, tokenizer.get_vocab_size() + 3, lengths.sum()).tolist()
    end = 0
    for length, cut in zip(lengths.tolist(), cuts, strict=True):
        begin, end = end, end + length
        ids = tokens[begin:end]
        whole = codec.decode(ids)
        stream = codec.stream()
        first = stream.push(ids[:cut])
        # A piece ends with a whole character: what is shown is never taken back.
        assert whole.startswith(first)
        assert first + stream.push(ids[cut:]) + stream.finish() == whole
        going_on = codec.stream(continues=True)
        assert (going_on.push(ids) + going_on.finish()).endswith(whole.lstrip(" "))


@pytest.mark.parametrize("kind", KINDS)
def test_valid_text_decodes_as_the_library_does(kind):
    """Where every byte belongs to a character, the library and the stream say the same."""
    tokenizer = KINDS[kind]()
    codec = TextCodec(tokenizer, None)
    random = np.random.default_rng(1)
    pieces = ["a", "b", " ", "  ", "é", "你", "好", "🙂", "\n", "the", ".", "<tool>", "<s>"]
    for _ in range(500):
        text = "".join(random.choice(pieces, random.integers(1, 9)))
        ids = tokenizer.encode(text).ids
        assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_whole_character_then_half_of_one_then_text():
    """The library's own stream raises here: a byte run that it had shown a part of is no text any more."""
    tokenizer = byte_fallback()
    codec = TextCodec(tokenizer, None)
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + "好".encode()[:2]]
    ids.append(tokenizer.token_to_id("a"))
    stream = codec.stream(continues=True)
    pieces = [stream.push([token]) for token in ids]
    assert pieces == ["", "", "你", "", "", "\ufffda"]
    assert stream.finish() == ""


def test_what_is_left_at_the_end_is_shown():
    tokenizer = byte_fallback()
    stream = TextCodec(tokenizer, None).stream()
    assert stream.push([tokenizer.token_to_id("<0xE4>")]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", [byte_fallback, sentencepiece])
def test_a_completion_keeps_its_leading_space(kind):
    tokenizer = kind()
    codec = TextCodec(tokenizer, None)
    ids = [tokenizer.token_to_id("▁the"), tokenizer.token_to_id("he")]
    for continues, text in ((False, "thehe"), (True, " thehe")):
        stream = codec.stream(continues=continues)
        assert stream.push(ids) + stream.finish() == text


def test_a_decoder_that_is_not_known_is_named():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UnknownDecoderError, match="has no decoder"):
        TextCodec(tokenizer, None)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnknownDecoderError, match="'WordPiece' is not known"):
        TextCodec(tokenizer, None)
