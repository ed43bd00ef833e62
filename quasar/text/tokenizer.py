"""Text ↔ token ids, without transformers: the tokenizers library, the chat template, special tokens in content."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from quasar.errors import DamagedEngineError, PromptError
from quasar.text.chat_template import ChatOptions, ChatTemplate
from quasar.text.detokenizer import Detokenizer, TextStream, UnknownDecoderError
from quasar.text.encoding import encode_text
from quasar.text.literal import LiteralEncoder
from quasar.text.messages import Message, content_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextCodec:
    """A tokenizer and, where the checkpoint has one, its chat template."""

    def __init__(self, tokenizer: "Tokenizer", chat_template: ChatTemplate | None, *, bos_token: str = "") -> None:
        """`bos_token`: not put before a text that begins with it already.

        Raises `UnknownDecoderError` for a tokenizer whose tokens cannot be made text.
        """
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.detokenizer = Detokenizer(tokenizer)
        self._bos_id: int | None = tokenizer.token_to_id(bos_token) if bos_token else None

    @classmethod
    def from_file(cls, path: Path, chat_template: ChatTemplate | None, *, bos_token: str = "") -> "TextCodec":
        """Load `tokenizer.json`; raises `DamagedEngineError` if the library cannot read it."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DamagedEngineError(f"{path} cannot be read ({error}): build the engine again") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        try:
            return cls(tokenizer, chat_template, bos_token=bos_token)
        except UnknownDecoderError as error:
            raise DamagedEngineError(f"{path} cannot be used: {error}") from None

    @cached_property
    def literal(self) -> LiteralEncoder:
        """Special tokens by name, and text in which some of them stand for themselves."""
        return LiteralEncoder(self.tokenizer)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds to a document, BOS once."""
        ids = self._encode(text, special_tokens=True)
        return ids[1:] if self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id] else ids

    def encode_chat(self, messages: Sequence[Message], options: ChatOptions | None = None) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Content is text: a special token that a message spells is its characters, unless `options.parse_special`.
        Without a template a lone user message is the text itself; more of them are written down one after the other
        (`plain_conversation`).

        Raises `PromptError` for what the template cannot render or does not read.
        """
        options = ChatOptions() if options is None else options
        if options.continue_final_message and messages[-1].get("role") != "assistant":
            raise PromptError("continue_final_message needs an assistant's message at the end")
        given = (list(messages), options.tools, options.arguments)
        literal = not options.parse_special and self.literal.spells_special(given)
        if literal:
            messages, tools, arguments = self.literal.mark(given)
            options = replace(options, tools=tuple(tools), arguments=arguments)
        text = self._rendered(messages, options)
        if not literal:
            return self._encode(text, special_tokens=self.chat_template is None)
        _check_unicode(text)
        ids = self.literal.encode(text)
        # What is added to a document is added here, too.
        frame = self._encode("", special_tokens=True) if self.chat_template is None else []
        return [*frame[: frame.index(self._bos_id) + 1], *ids] if self._bos_id in frame else ids

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer, to stand after `encode_chat`: no token is added, and special ones in it are text.

        Without a template an empty line comes first.
        """
        return self.encode_continuation(text if self.chat_template is not None else f"\n\n{text}")

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on from other text: no token is added, and special ones in it are text."""
        _check_unicode(text)
        if self.literal.spells_special(text):
            return self.literal.encode(self.literal.mark(text))
        return self._encode(text, special_tokens=False)

    def _rendered(self, messages: Sequence[Message], options: ChatOptions) -> str:
        if self.chat_template is not None:
            return self.chat_template.render(messages, options)
        for name in ("template", "tools", "arguments"):
            if getattr(options, name):
                raise PromptError(f"{name} was given, and this engine has no chat template that would read it")
        return plain_conversation(messages, continues=options.continue_final_message)

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        _check_unicode(text)
        return encode_text(self.tokenizer, text, special_tokens=special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no character show as U+FFFD."""
        stream = self.stream()
        return stream.push(token_ids) + stream.finish()

    def stream(self, *, continues: bool = False) -> TextStream:
        """Text of tokens as they come; `continues`: they go on from others of the same text."""
        return TextStream(self.detokenizer, continues=continues)


def plain_conversation(messages: Sequence[Message], *, continues: bool = False) -> str:
    """What a conversation is written as where a checkpoint has no chat template.

    A lone user message is its content. Otherwise every message is "Role: content" with an empty line after it, and
    "Assistant:" follows; `continues`: the last message is left open.

    Raises `PromptError` for what this form cannot say.
    """
    for message in messages:
        for key in message:
            if key not in ("role", "content"):
                raise PromptError(f"a message has the key {key!r}, which needs a chat template; this engine has none")
    if len(messages) == 1 and messages[0].get("role") == "user":
        return content_of(messages[0])
    lines = [f"{message.get('role', '').capitalize()}: {content_of(message)}" for message in messages]
    return "\n\n".join(lines if continues else [*lines, "Assistant:"])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is not Unicode text ({error.reason} at character {error.start})") from None
