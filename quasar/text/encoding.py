"""Text → token ids, with the tokenizers library."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The library keeps Python's lock while it encodes one text, a second for a million characters, and gives it up for a
# list. Shorter texts are encoded as one: a list starts threads of the library's.
_LONG = 8192


def encode_text(tokenizer: "Tokenizer", text: str, *, special_tokens: bool) -> list[int]:
    """Token ids of a text; other threads go on meanwhile. `special_tokens`: with those that a document gets."""
    if len(text) < _LONG:
        encoded = tokenizer.encode(text, add_special_tokens=special_tokens)
    else:
        [encoded] = tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
    ids: list[int] = encoded.ids
    return ids
