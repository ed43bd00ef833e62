"""Text in and out of an engine: its tokenizer and chat template."""

import logging
from pathlib import Path

from engines.text_files import TextFiles
from quasar.text import ChatTemplate, TextCodec

_log = logging.getLogger("quasar.engines")


def open_codec(directory: Path, files: TextFiles) -> TextCodec:
    """The codec over an engine directory's tokenizer and chat templates."""

    def source(name: str) -> str:
        return (directory / name).read_text(encoding="utf-8")

    template = None
    if files.chat_template or files.named_templates:
        template = ChatTemplate(
            source(files.chat_template) if files.chat_template else "",
            bos_token=files.bos_token,
            eos_token=files.eos_token,
            named={name: source(path) for name, path in files.named_templates.items()},
            date=files.date,
        )
    else:
        _log.warning("%s has no chat template: conversations are written down plainly (docs/runtime.md)", directory)
    return TextCodec.from_file(directory / files.tokenizer, template, bos_token=files.bos_token)
