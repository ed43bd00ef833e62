"""What a Hugging Face folder says of text: tokenizer, chat templates, end tokens, sampling defaults.

`tokenizer.json` is the tokenizer where it is there. transformers 5 makes some classes anew from vocabulary and merges
alone (a Qwen2 model with DeepSeek's tokenizer gets Qwen2's rule), and adds tokens that such a class expects; what it
knows beside the file (special tokens, templates, what frames a document) is taken from it.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasar.checkpoints.checkpoint_text import CheckpointText, chat_templates, end_ids, sampling_defaults
from quasar.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What any of transformers' tokenizers is made from; tokenizer_config.json and chat templates are no tokenizer.
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")

_log = logging.getLogger("quasar.checkpoints")


def folder_text(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> CheckpointText:
    """What a folder with these configs says of text; code from it is never run.

    Raises `CheckpointError` if there is no tokenizer, or none that the `tokenizers` library can run.
    """
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has no tokenizer: tokenizer.json was expected beside the weights, or what it is made from "
            "(tokenizer.model, vocab.json): download it from where the weights are from"
        )
    known = _known_to_transformers(folder)
    tokenizer = _tokenizer(folder, known)
    eos_token = known.eos_token or ""
    return CheckpointText(
        tokenizer=tokenizer,
        chat_templates=chat_templates(getattr(known, "chat_template", None)),
        bos_token=known.bos_token or "",
        eos_token=eos_token,
        end_ids=end_ids(
            (
                ("generation_config.json", generation.get("eos_token_id")),
                ("config.json", config.get("eos_token_id")),
                ("the tokenizer's end token", tokenizer.token_to_id(eos_token) if eos_token else None),
            )
        ),
        sampling=sampling_defaults(generation, draws=bool(generation.get("do_sample", False))),
    )


def _known_to_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises whatever its readers do
        reason = " ".join(str(error).split())[:200]
    if (folder / "tokenizer.json").is_file():
        # A class that comes as code, which is never run; the files say what is needed.
        with suppress(Exception):
            return PreTrainedTokenizerFast.from_pretrained(folder, **options)
    raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({reason})")


def _tokenizer(folder: Path, known: Any) -> "Tokenizer":
    """`known`: transformers' tokenizer of the folder."""
    from tokenizers import AddedToken, Tokenizer

    backend = getattr(known, "backend_tokenizer", None)
    path = folder / "tokenizer.json"
    if not path.is_file():
        if backend is None:
            raise CheckpointError(f"{folder}: the tokenizer has no fast form (tokenizer.json)")
        made: Tokenizer = backend
        return made
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None
    _add_missing(folder, tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    special = {one.content for one in added.values() if one.special}
    for name in known.all_special_tokens:
        # A role makes a token special, whatever the file says of it; roles of tokens that are not there are none.
        if name not in special and tokenizer.token_to_id(name) is not None:
            tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    if backend is not None:
        frame = backend.encode("").ids
        if frame != tokenizer.encode("").ids and all(
            tokenizer.id_to_token(token) == backend.id_to_token(token) for token in frame
        ):
            # add_bos_token and add_eos_token of tokenizer_config.json.
            tokenizer.post_processor = backend.post_processor
        if tokenizer.to_str() != backend.to_str():
            _log.info("%s: transformers makes another tokenizer than tokenizer.json, which is used", folder)
    return tokenizer


def _add_missing(folder: Path, tokenizer: "Tokenizer") -> None:
    """Tokens that tokenizer_config.json or added_tokens.json name and tokenizer.json lacks."""
    from tokenizers import AddedToken

    found: dict[int, dict[str, Any]] = {}
    for content, token in _json(folder / "added_tokens.json").items():
        found[int(token)] = {"content": content}
    for token, values in _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[int(token)] = values
    for token, values in sorted(found.items()):
        content = str(values["content"])
        if tokenizer.token_to_id(content) is not None:
            continue
        flags = {name: bool(values[name]) for name in ("special", "lstrip", "rstrip", "normalized") if name in values}
        tokenizer.add_tokens([AddedToken(content, **flags)])
        if tokenizer.token_to_id(content) != token:
            raise CheckpointError(
                f"{folder}: tokenizer_config.json gives {content!r} the id {token}, after tokenizer.json it would have "
                f"{tokenizer.token_to_id(content)}: the files are of different tokenizers"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    return value if isinstance(value, dict) else {}
