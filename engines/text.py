"""Text in and out of an engine: its tokenizer and chat template."""

from pathlib import Path

from engines.manifest import TextFiles
from quasar.text import ChatTemplate, TextCodec


def open_codec(directory: Path, files: TextFiles) -> TextCodec:
    """The codec over an engine directory's tokenizer and chat template."""
    template = None
    if files.chat_template:
        source = (directory / files.chat_template).read_text(encoding="utf-8")
        template = ChatTemplate(source, bos_token=files.bos_token, eos_token=files.eos_token)
    return TextCodec.from_file(directory / files.tokenizer, template)
