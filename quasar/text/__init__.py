"""Prompt files, the tokenizer and the sandboxed chat template."""

from quasar.text.chat_template import ChatTemplate, Message
from quasar.text.prompts import Prompt, read_prompts
from quasar.text.tokenizer import TextCodec, TextStream

__all__ = ["ChatTemplate", "Message", "Prompt", "TextCodec", "TextStream", "read_prompts"]
