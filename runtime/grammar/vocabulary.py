"""An engine's vocabulary as llguidance asks for it: the bytes of every token, and how a text is cut into tokens.

Bytes are those of `Detokenizer`, so that a grammar sees the text that a caller gets, whatever the tokenizer's kind.
"""

from collections.abc import Collection

from quasar.text import TextCodec

# A token with this first byte is no text: only its name in a grammar stands for it.
_SPECIAL = b"\xff"
# A character that no vocabulary joins with others: what follows it is inside of a text.
_SEPARATOR = "\x02"


class Vocabulary:
    """A tokenizer for llguidance (its `TokenizerWrapper`).

    `tokens`: the bytes of every id; b"" where an id has no token. `eos_token_id` None: llguidance adds an end id of its
    own after the last one.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    # They are marked in `tokens`, with their names.
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, codec: TextCodec, *, vocab_size: int, end_ids: Collection[int]) -> None:
        """`vocab_size`: the model's, which may be larger than the tokenizer's. `end_ids` end an answer: no text."""
        self._codec = codec
        self.eos_token_id = min(end_ids, default=None)
        self.tokens = [self._bytes_of(token, is_end=token in end_ids) for token in range(vocab_size)]
        self._longest = max((len(one) for one in self.tokens), default=0)
        self._ids = {one: token for token, one in reversed(list(enumerate(self.tokens)))}

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of a text that goes on from another: their bytes are the text's, exactly.

        Raises `ValueError` for a text that this vocabulary cannot spell.
        """
        wanted = text if isinstance(text, bytes) else text.encode()
        text = wanted.decode()
        ids = self._encode(text)
        if self._spell(ids) == wanted:
            return ids
        # A tokenizer that puts a space before a text: what comes after a separator has none.
        ids, before = self._encode(f"{_SEPARATOR}{text}"), b""
        while ids and not before.endswith(_SEPARATOR.encode()):
            before += self.tokens[ids.pop(0)]
        return ids if self._spell(ids) == wanted else self._longest_first(wanted)

    def _bytes_of(self, token: int, *, is_end: bool) -> bytes:
        piece = self._codec.tokenizer.id_to_token(token)
        if piece is None:
            return b""
        detokenizer = self._codec.detokenizer
        is_text = detokenizer.is_shown(token) and not is_end
        return detokenizer.token_bytes(token) if is_text else _SPECIAL + str(piece).encode()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._codec.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def _longest_first(self, wanted: bytes) -> list[int]:
        ids: list[int] = []
        place = 0
        while place < len(wanted):
            for end in range(min(len(wanted), place + self._longest), place, -1):
                token = self._ids.get(wanted[place:end])
                if token is not None:
                    ids.append(token)
                    place = end
                    break
            else:
                raise ValueError(f"no token spells the byte {wanted[place]:#04x}")
        return ids
