"""Text ↔ token ids, without transformers: the tokenizers library, the chat template, and streaming UTF-8."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quasar.errors import DamagedEngineError, PromptError
from quasar.text.chat_template import ChatTemplate, Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextCodec:
    """A tokenizer and, where the checkpoint has one, its chat template."""

    def __init__(self, tokenizer: "Tokenizer", chat_template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @classmethod
    def from_file(cls, path: Path, chat_template: ChatTemplate | None) -> "TextCodec":
        """Load `tokenizer.json`; raises `DamagedEngineError` if the library cannot read it."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DamagedEngineError(f"{path} cannot be read ({error}): build the engine again") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, chat_template)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds to a document."""
        return self._encode(text, special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the answer; the last user turn as plain text without a template."""
        if self.chat_template is None:
            return self.encode_text(messages[-1]["content"])
        return self._encode(self.chat_template.render(messages), special_tokens=False)

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not Unicode text ({error.reason} at character {error.start})") from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class TextStream:
    """Text of a growing list of tokens, never with half a UTF-8 character in it."""

    def __init__(self, codec: TextCodec) -> None:
        from tokenizers.decoders import DecodeStream

        self._codec = codec
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; "" while a character is still open."""
        pieces = []
        for token_id in token_ids:
            self._token_ids.append(token_id)
            pieces.append(self._stream.step(self._codec.tokenizer, token_id) or "")
        piece = "".join(pieces)
        self._text += piece
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come: an unfinished character shows as U+FFFD."""
        whole = self._codec.decode(self._token_ids)
        rest = whole[len(self._text) :] if whole.startswith(self._text) else ""
        self._text += rest
        return rest
