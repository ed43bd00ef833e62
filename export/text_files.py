"""Tokenizer and chat templates of a checkpoint, as the torch-free runtime reads them, and its end tokens."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.text_files import TextFiles
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint_text import CheckpointText, EndToken
from quasar.errors import CheckpointError, PromptError
from quasar.files import atomic_path, write_text
from quasar.text import ChatTemplate, Detokenizer, Prompt, TextCodec
from quasar.text.detokenizer import UnknownDecoderError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_QUESTION, _ANSWER = "quasar-asks", "quasar-answers"

_log = logging.getLogger("quasar.export")


def checked_text(checkpoint: Checkpoint) -> CheckpointText:
    """A checkpoint's tokenizer and chat templates, as the runtime can use them.

    Special tokens that have no row of the embedding are left out.

    Raises `CheckpointError` if the checkpoint has no tokenizer, one that the runtime cannot use, or one that belongs to
    other weights.
    """
    text = checkpoint.text()
    try:
        Detokenizer(text.tokenizer)
    except UnknownDecoderError as error:
        raise CheckpointError(f"{checkpoint.location}: {error}; its tokens cannot be made text") from None
    text = _within_vocabulary(checkpoint, text)
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
    rendered = _conversation(text)
    after = rendered.partition(_ANSWER)[2].lstrip()
    added = text.tokenizer.get_added_tokens_decoder()
    special = {one.content: token for token, one in added.items() if one.special and one.content != text.bos_token}
    starts = [name for name in special if name and after.startswith(name)]
    # A template without an end of turns goes on with the next turn's beginning, which stands before the first one, too.
    begins = rendered.partition(_QUESTION)[0]
    name = max(starts, key=len, default="")
    return None if not name or name in begins else special[name]


def _conversation(text: CheckpointText) -> str:
    """A question, an answer and a question as the default template writes them; empty where it does not."""
    template = _chat_template(text)
    if template is None or "default" not in template.names:
        return ""
    messages = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})
    try:
        # Both, so that what a template puts before the next answer is not taken for the end of this one.
        return template.render((*messages, {"role": "user", "content": _QUESTION}))  # type: ignore[arg-type]
    except PromptError:
        return ""


def _chat_template(text: CheckpointText) -> ChatTemplate | None:
    """As an engine has it."""
    named = dict(text.chat_templates)
    if not named:
        return None
    return ChatTemplate(named.pop("default", ""), bos_token=text.bos_token, eos_token=text.eos_token, named=named)


def _within_vocabulary(checkpoint: Checkpoint, text: CheckpointText) -> CheckpointText:
    """The text without special tokens that have no row of the embedding, as those of images that a text model lacks.

    Raises `CheckpointError` for another token without a row: one that a text spells, or that the model's text needs.
    """
    rows = checkpoint.spec.vocab_size
    beyond = sorted((token, word) for word, token in text.tokenizer.get_vocab().items() if token >= rows)
    if not beyond:
        return text
    state = json.loads(text.tokenizer.to_str())
    needed = _needed(text, state)
    special = {token for token, one in text.tokenizer.get_added_tokens_decoder().items() if one.special}
    for token, word in beyond:
        if token not in special or word in needed:
            raise CheckpointError(
                f"{checkpoint.location}: the tokenizer has the token {word!r} with id {token}, "
                f"the embedding only {rows} rows: take the tokenizer that belongs to these weights"
            )
    names = [word for _, word in beyond]
    _log.warning(
        "%s: the embedding has no row for %s, which becomes plain text",
        checkpoint.location,
        ", ".join(map(repr, names)),
    )
    return replace(text, tokenizer=_without(state, names))


def _needed(text: CheckpointText, state: dict[str, Any]) -> set[str]:
    """Tokens that frame a document, begin or end a text, are in a plain conversation, or that ordinary pieces lead to.

    `state`: of tokenizer.json.
    """
    conversation, model = _conversation(text), state["model"]
    added = text.tokenizer.get_added_tokens_decoder().values()
    return {
        text.bos_token,
        text.eos_token,
        *(one.token for one in end_tokens(text)),
        *_strings((state["post_processor"], state["decoder"], model.get("unk_token"))),
        *(one.content for one in added if one.content and one.content in conversation),
        *("".join(pair) for pair in model.get("merges", ())),
        # Unigram's ids are places in a list.
        *(piece for piece, _ in (model["vocab"] if isinstance(model["vocab"], list) else ())),
    }


def _strings(value: Any) -> set[str]:
    """Every string anywhere in a JSON value, keys included."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return _strings((*value, *value.values()))
    return set().union(*map(_strings, value)) if isinstance(value, (list, tuple)) else set()


def _without(state: dict[str, Any], names: Sequence[str]) -> "Tokenizer":
    """The tokenizer of a tokenizer.json without some of its added tokens."""
    from tokenizers import Tokenizer

    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in names]
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        # Converters list added tokens there, too.
        state["model"]["vocab"] = {word: token for word, token in vocabulary.items() if word not in names}
    # It may name them, and an engine pads nothing.
    state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))
