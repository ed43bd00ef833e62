"""Prompt files, the tokenizer and the sandboxed chat template."""

from quasar.text.chat_template import ChatOptions, ChatTemplate
from quasar.text.detokenizer import Detokenizer, TextStream
from quasar.text.messages import Message
from quasar.text.prompts import Prompt, read_prompts
from quasar.text.tokenizer import TextCodec

__all__ = [
    "ChatOptions",
    "ChatTemplate",
    "Detokenizer",
    "Message",
    "Prompt",
    "TextCodec",
    "TextStream",
    "read_prompts",
]
