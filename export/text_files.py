"""Tokenizer and chat template of a checkpoint, as the torch-free runtime reads them."""

from pathlib import Path
from typing import Any

from engines.manifest import TextFiles
from quasar.checkpoints import Checkpoint
from quasar.errors import CheckpointError
from quasar.files import atomic_path, write_text

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"


def write_text_files(checkpoint: Checkpoint, directory: Path) -> TextFiles:
    """Write `tokenizer.json` and, where the checkpoint has one, `chat_template.jinja`.

    Raises `CheckpointError` if the checkpoint has no tokenizer, or one that has no fast form.
    """
    try:
        tokenizer = checkpoint.transformers_tokenizer()
    except Exception as error:  # transformers raises whatever its readers do
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.location}: the tokenizer cannot be loaded ({reason})") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{checkpoint.location}: the tokenizer has no fast form (tokenizer.json)")
    if backend.get_vocab_size() > checkpoint.spec.vocab_size:
        raise CheckpointError(
            f"{checkpoint.location}: the tokenizer has {backend.get_vocab_size()} tokens, "
            f"the embedding only {checkpoint.spec.vocab_size}"
        )
    with atomic_path(directory / TOKENIZER) as temporary:
        backend.save(str(temporary))
    template = _template(tokenizer)
    if template:
        write_text(directory / CHAT_TEMPLATE, template)
    return TextFiles(
        tokenizer=TOKENIZER,
        chat_template=CHAT_TEMPLATE if template else "",
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        eos_token_ids=checkpoint.spec.eos_token_ids,
    )


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or ""
