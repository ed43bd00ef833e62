"""Log-probabilities as OpenAI writes them: one form for chats, an older one for completions."""

from collections.abc import Sequence
from typing import Any

from quasar.text import TextCodec
from runtime import TokenLogprob


def chat_logprobs(entries: Sequence[TokenLogprob], codec: TextCodec) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    content = [
        {
            **_named(one.token_id, one.logprob, codec),
            "top_logprobs": [_named(token, logprob, codec) for token, logprob in one.top],
        }
        for one in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, piece by piece; `text_offset` counts from the answer's beginning."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._stream = codec.stream(continues=True)
        self._offset = 0

    def of(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The object for the next tokens."""
        offsets = []
        for one in entries:
            offsets.append(self._offset)
            self._offset += len(self._stream.push([one.token_id]))
        return {
            "tokens": [_spelled(one.token_id, self._codec) for one in entries],
            "token_logprobs": [one.logprob for one in entries],
            "top_logprobs": [_likeliest(one, self._codec) for one in entries]
            if any(one.top for one in entries)
            else None,
            "text_offset": offsets,
        }


def _likeliest(entry: TokenLogprob, codec: TextCodec) -> dict[str, float]:
    """The likeliest tokens and the answer's own, which may not be among them."""
    return {_spelled(token, codec): logprob for token, logprob in (*entry.top, (entry.token_id, entry.logprob))}


def _named(token: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    value = _bytes(token, codec)
    return {"token": value.decode(errors="replace"), "logprob": logprob, "bytes": [*value]}


def _spelled(token: int, codec: TextCodec) -> str:
    """The token as text; the bytes of one that holds a part of a character, since several look alike as text."""
    value = _bytes(token, codec)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _bytes(token: int, codec: TextCodec) -> bytes:
    """Bytes of a token; a special one, which is no part of any text, by its name."""
    return codec.detokenizer.token_bytes(token) or (codec.tokenizer.id_to_token(token) or "").encode()
