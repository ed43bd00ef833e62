"""Special tokens that a user wrote: text, unless the chat template put them there.

Message content is marked before the template renders it: a random word is put into every special token that it spells.
Afterwards a special token with the word in it is the user's, and one without is the template's. A token that comes
about only where content and template meet ("<|im_end|" before ">") counts as the template's.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from quasar.text.encoding import encode_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_Value = TypeVar("_Value")


class LiteralEncoder:
    """Encodes rendered text in which some special tokens are control tokens and others are plain text."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._special = {one.content: token for token, one in added.items() if one.special and one.content}
        # Longest first, as the library matches.
        names = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None
        self._word = secrets.token_hex(16)
        self._tokenizer = tokenizer
        self._aliased: tuple[Callable[[str], list[int]], dict[str, str], dict[int, int]] | None = None

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens by spelling."""
        return self._special

    def spells_special(self, value: Any) -> bool:
        """Whether a string anywhere in a JSON-like value holds a special token."""
        if isinstance(value, str):
            return self._pattern is not None and self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(map(self.spells_special, (*value, *value.values())))
        return isinstance(value, (list, tuple)) and any(self.spells_special(item) for item in value)

    def mark(self, value: _Value) -> _Value:
        """The value with every special token in its strings marked as text."""
        marked: Any = value
        if isinstance(value, str) and self._pattern is not None:
            marked = self._pattern.sub(lambda found: self._marked(found[0]), value)
        elif isinstance(value, Mapping):
            # Names of a tool's parameters are a user's words as well.
            marked = {self.mark(key): self.mark(item) for key, item in value.items()}
        elif isinstance(value, (list, tuple)):
            marked = [self.mark(item) for item in value]
        result: _Value = marked
        return result

    def unmarked(self, text: str) -> str:
        """A rendered text without the marks."""
        return text.replace(self._word, "")

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered text: marked special tokens as text, the others as what they are."""
        encode, aliases, originals = self._aliased or self._alias()
        assert self._pattern is not None
        # Names that the vocabulary has no entry for stand in for the template's tokens, while theirs are off.
        text = self.unmarked(self._pattern.sub(lambda found: aliases[found[0]], rendered))
        return [originals.get(token, token) for token in encode(text)]

    def _marked(self, name: str) -> str:
        return name[0] + self._word + name[1:]

    def _alias(self) -> tuple[Callable[[str], list[int]], dict[str, str], dict[int, int]]:
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        added = copy.get_added_tokens_decoder()
        # No alias begins another one: the numbers have one length. Its word is not the marks', which are taken out.
        word = secrets.token_hex(16)
        aliases = {name: f"\ufdd0{word}{place:06d}\ufdd1" for place, name in enumerate(self._special)}
        copy.add_tokens(
            [
                AddedToken(
                    aliases[name],
                    special=False,
                    normalized=False,
                    lstrip=added[token].lstrip,
                    rstrip=added[token].rstrip,
                )
                for name, token in self._special.items()
            ]
        )
        originals: dict[int, int] = {}
        for name, token in self._special.items():
            alias = copy.token_to_id(aliases[name])
            assert alias is not None  # it was added above
            originals[alias] = token

        def encode(text: str) -> list[int]:
            return encode_text(copy, text, special_tokens=False)

        self._aliased = (encode, aliases, originals)
        return self._aliased
