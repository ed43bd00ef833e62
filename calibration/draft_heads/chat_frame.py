"""Where a user's words stand in a conversation: what the chat template writes before them, and what ends them."""

from dataclasses import dataclass

from quasar.errors import PromptError
from quasar.text import TextCodec
from quasar.text.encoding import encode_text

# A text that no template changes or looks at.
_MARK = "quasarusertext"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFrame:
    """The frame of a lone user message.

    `opening`: token ids up to where the user's words begin; none for some base models. `ending`: text that can only
    stand after them; "" where a special token says it. `is_chat`: whether there is a chat template.
    """

    opening: tuple[int, ...]
    ending: str
    is_chat: bool

    def before_ending(self, text: str) -> str:
        """What stands before the ending in what the model wrote of a user's words."""
        return text.partition(self.ending)[0] if self.ending else text

    def has_ended(self, text: str) -> bool:
        """Whether the ending stands in it."""
        return bool(self.ending) and self.ending in text


def chat_frame(codec: TextCodec) -> ChatFrame:
    """The frame of a codec's template; raises `PromptError` if it does not show what a user says."""
    template = codec.chat_template
    if template is None:
        return ChatFrame(opening=tuple(codec.encode_text("")), ending="", is_chat=False)
    before, mark, after = template.render([{"role": "user", "content": _MARK}]).partition(_MARK)
    if not mark:
        raise PromptError("the chat template does not show what a user says, so the model cannot write a user's words")
    special = codec.literal.special_tokens
    first = after.split()[0] if after.split() else ""
    return ChatFrame(
        opening=tuple(encode_text(codec.tokenizer, before, special_tokens=False)),
        ending="" if any(first.startswith(token) for token in special) else first,
        is_chat=True,
    )
