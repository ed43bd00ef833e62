"""Tokens → text, as bytes: any sequence of ids has a text, and the pieces of a stream always make up the whole.

The `tokenizers` library decodes a run of byte tokens as a whole, and gives it up as a whole where one byte is no part
of a character: what it shows of a growing text changes after it was shown, and its stream raises. Here every byte
counts for itself: whole characters are shown when they are whole, other bytes as U+FFFD.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens whose bytes are kept: those of most text, in a megabyte or two.
_MOST_KNOWN = 8192
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnknownDecoderError(ValueError):
    """A tokenizer.json has a decoder that is not known here; the message names it."""


class Detokenizer:
    """Bytes of tokens. Byte-level, byte-fallback and SentencePiece (Metaspace) vocabularies are known.

    Raises `UnknownDecoderError` for a tokenizer with another decoder.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(token for token, one in added.items() if one.special)
        self._of_piece, self._at_start = _piece_decoder(_decoder_steps(tokenizer))
        self._known_bytes = lru_cache(_MOST_KNOWN)(partial(_bytes_of, tokenizer, self._skipped, self._of_piece))

    def is_shown(self, token_id: int) -> bool:
        """Whether a token is part of the text: not a special one, nor an id without a token."""
        return token_id not in self._skipped and self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token inside a text; b"" for special tokens and ids without a token."""
        return self._known_bytes(token_id)

    def first_bytes(self, token_id: int) -> bytes:
        """The same where the token begins a text: SentencePiece puts a space there that nobody wrote."""
        return self._at_start(self.token_bytes(token_id))


def _bytes_of(
    tokenizer: "Tokenizer", skipped: frozenset[int], of_piece: Callable[[str], bytes], token_id: int
) -> bytes:
    piece = tokenizer.id_to_token(token_id) if token_id not in skipped else None
    return b"" if piece is None else of_piece(piece)


class TextStream:
    """Text of a growing list of tokens, never with half a character in it.

    Args:
        continues: the tokens go on from others of the same text, so that a leading space is the text's own.
    """

    def __init__(self, detokenizer: Detokenizer, *, continues: bool = False) -> None:
        self._detokenizer = detokenizer
        self._started = continues
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; "" while a character is still open."""
        pieces = []
        for token_id in token_ids:
            if self._started:
                pieces.append(self._detokenizer.token_bytes(token_id))
            elif self._detokenizer.is_shown(token_id):
                self._started = True
                pieces.append(self._detokenizer.first_bytes(token_id))
        return self._decoder.decode(b"".join(pieces))

    def finish(self) -> str:
        """What is left when no more tokens come: an unfinished character shows as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _decoder_steps(tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    decoder = tokenizer.decoder
    if decoder is None:
        raise UnknownDecoderError("the tokenizer has no decoder")
    value = json.loads(decoder.__getstate__())
    return list(_flat([value]))


def _flat(steps: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for step in steps:
        if step["type"] == "Sequence":
            yield from _flat(step["decoders"])
        else:
            yield dict(step)


def _piece_decoder(steps: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], Callable[[bytes], bytes]]:
    """(piece → bytes, what is done to the bytes that begin a text), from the steps of a tokenizer.json's decoder."""
    replacements: list[tuple[str, str]] = []
    byte_level = byte_fallback = False
    at_start: Callable[[bytes], bytes] = bytes
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            if step["prepend_scheme"] != "never":
                at_start = _without_leading_spaces
        elif kind == "Strip" and step["stop"] == 0:
            at_start = _stripper(step["content"].encode(), int(step["start"]))
        elif kind != "Fuse":
            raise UnknownDecoderError(f"the tokenizer's decoder {kind!r} is not known")
    table = _byte_level_table() if byte_level else {}

    def of_piece(piece: str) -> bytes:
        if byte_level:
            # A piece with a character outside the alphabet is an added token, which is spelled as it is.
            try:
                return bytes(map(table.__getitem__, piece))
            except KeyError:
                return piece.encode()
        if byte_fallback and (found := _BYTE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return of_piece, at_start


def _without_leading_spaces(value: bytes) -> bytes:
    return value.lstrip(b" ")


def _stripper(content: bytes, most: int) -> Callable[[bytes], bytes]:
    def strip(value: bytes) -> bytes:
        for _ in range(most):
            value = value.removeprefix(content)
        return value

    return strip


def _byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
