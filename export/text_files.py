"""Tokenizer and chat templates of a checkpoint, as the torch-free runtime reads them, and its end tokens."""

import re
from collections.abc import Sequence
from pathlib import Path

from engines.text_files import TextFiles
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint_text import CheckpointText, EndToken
from quasar.errors import CheckpointError, PromptError
from quasar.files import atomic_path, write_text
from quasar.text import ChatTemplate, Detokenizer, Prompt, TextCodec
from quasar.text.detokenizer import UnknownDecoderError

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_QUESTION, _ANSWER = "quasar-asks", "quasar-answers"


def checked_text(checkpoint: Checkpoint) -> CheckpointText:
    """A checkpoint's tokenizer and chat templates, as the runtime can use them.

    Raises `CheckpointError` if the checkpoint has no tokenizer, one that the runtime cannot use, or one that belongs to
    other weights.
    """
    text = checkpoint.text()
    try:
        Detokenizer(text.tokenizer)
    except UnknownDecoderError as error:
        raise CheckpointError(f"{checkpoint.location}: {error}; its tokens cannot be made text") from None
    _check_vocabulary(checkpoint, text)
    for name in text.chat_templates:
        if not _TEMPLATE_NAME.fullmatch(name):
            raise CheckpointError(f"{checkpoint.location}: a chat template is named {name!r}; letters, digits, - and _")
    return text


def check_prompts(text: CheckpointText, prompts: Sequence[Prompt], kind: str) -> None:
    """Raise `PromptError` naming a prompt that the chat template refuses, or cannot render, and what it says of it.

    `kind`: what the prompts are for.
    """
    codec = TextCodec(text.tokenizer, _chat_template(text), bos_token=text.bos_token)
    for number, prompt in enumerate(prompts, start=1):
        try:
            if not len(codec.encode_chat(prompt.messages)):
                raise PromptError("it has no tokens: take it out")
        except PromptError as error:
            raise PromptError(f"{kind} prompt {number} ({prompt.text[:60]!r}…): {error}") from None


def write_text_files(text: CheckpointText, directory: Path) -> tuple[TextFiles, dict[str, float | int]]:
    """Write `tokenizer.json` and the chat templates; returns what the manifest says of them, and sampling defaults."""
    with atomic_path(directory / TOKENIZER) as temporary:
        text.tokenizer.save(str(temporary))
    files = {}
    for name, source in text.chat_templates.items():
        files[name] = CHAT_TEMPLATE if name == "default" else f"chat_template.{name}.jinja"
        write_text(directory / files[name], source)
    ends = end_tokens(text)
    return TextFiles(
        tokenizer=TOKENIZER,
        chat_template=files.pop("default", ""),
        bos_token=text.bos_token,
        eos_token=text.eos_token,
        eos_token_ids=tuple(one.token_id for one in ends),
        named_templates=files,
        end_tokens=tuple({"id": one.token_id, "token": one.token, "sources": list(one.sources)} for one in ends),
    ), dict(text.sampling)


def text_warnings(files: TextFiles) -> list[str]:
    """What a user should know of a checkpoint's tokenizer and templates before the long part of a build."""
    warnings = []
    if not files.eos_token_ids:
        warnings.append("no token ends an answer: it stops at its length (generate --stop-token-ids)")
    if not files.chat_template:
        warnings.append("no chat template: conversations are written down plainly (docs/runtime.md)")
    return warnings


def end_tokens(text: CheckpointText) -> list[EndToken]:
    """Every token that ends an answer: what the checkpoint's files name, and what its template writes after one."""
    found = {token: list(sources) for token, sources in text.end_ids.items()}
    turn_end = _turn_end(text)
    if turn_end is not None:
        found.setdefault(turn_end, []).append("the chat template's end of a turn")
    return [
        EndToken(token_id=token, token=text.tokenizer.id_to_token(token) or "", sources=tuple(sources))
        for token, sources in found.items()
    ]


def _turn_end(text: CheckpointText) -> int | None:
    """The special token that the default template writes after an answer, if there is one."""
    template = _chat_template(text)
    if template is None or "default" not in template.names:
        return None
    messages = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})
    try:
        # Both, so that what a template puts before the next answer is not taken for the end of this one.
        rendered = template.render((*messages, {"role": "user", "content": _QUESTION}))  # type: ignore[arg-type]
    except PromptError:
        return None
    after = rendered.partition(_ANSWER)[2].lstrip()
    added = text.tokenizer.get_added_tokens_decoder()
    special = {one.content: token for token, one in added.items() if one.special and one.content != text.bos_token}
    starts = [name for name in special if name and after.startswith(name)]
    # A template without an end of turns goes on with the next turn's beginning, which stands before the first one, too.
    begins = rendered.partition(_QUESTION)[0]
    name = max(starts, key=len, default="")
    return None if not name or name in begins else special[name]


def _chat_template(text: CheckpointText) -> ChatTemplate | None:
    """As an engine has it."""
    named = dict(text.chat_templates)
    if not named:
        return None
    return ChatTemplate(named.pop("default", ""), bos_token=text.bos_token, eos_token=text.eos_token, named=named)


def _check_vocabulary(checkpoint: Checkpoint, text: CheckpointText) -> None:
    """Ids that have no row of the embedding are refused, unless nothing is spelled by them."""
    rows = checkpoint.spec.vocab_size
    beyond = sorted((token, word) for word, token in text.tokenizer.get_vocab().items() if token >= rows)
    if beyond:
        token, word = beyond[0]
        raise CheckpointError(
            f"{checkpoint.location}: the tokenizer has the token {word!r} with id {token}, "
            f"the embedding only {rows} rows: take the tokenizer that belongs to these weights"
        )
