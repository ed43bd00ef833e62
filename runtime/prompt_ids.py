"""From what a user asks to token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError
from quasar.text import ChatOptions, Message, TextCodec
from quasar.text.messages import check_messages

Int64 = NDArray[np.int64]
# One request's prompt: the user's message, messages, or token ids; and a list of them.
Prompt = str | Sequence[Message] | Sequence[int] | Int64
Prompts = list[str] | list[list[Message]] | list[list[int]] | list[Int64]


def encode_prompt(
    prompt: object, codec: TextCodec, chat: ChatOptions | None, history: tuple[Message, ...] = ()
) -> Int64:
    """Token ids int64 [n]; a string is the user's message after `history`. `chat` None: no chat template."""
    if isinstance(prompt, str):
        if chat is None:
            return np.asarray(codec.encode_text(prompt), np.int64)
        return np.asarray(codec.encode_chat([*history, {"role": "user", "content": prompt}], chat), np.int64)
    if isinstance(prompt, np.ndarray) or (
        isinstance(prompt, (list, tuple)) and all(isinstance(item, (int, np.integer)) for item in prompt)
    ):
        return _token_ids(prompt)
    if chat is None:
        raise GenerationError("messages need the chat template; without it give a string or token ids")
    return np.asarray(codec.encode_chat(check_messages(prompt, "prompt"), chat), np.int64)


def _token_ids(prompt: Any) -> Int64:
    ids = np.asarray(prompt)
    # Numbers that no type holds become objects.
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise GenerationError(f"the prompt is an array of {ids.dtype} {list(ids.shape)}; int64 [n] was expected")
    if len(ids) and int(ids.max()) > np.iinfo(np.int64).max:
        raise GenerationError(f"the prompt holds the token id {ids.max()}, which no vocabulary has")
    return ids.astype(np.int64)
