"""Where an answer ends, token by token, inside a block of accepted drafts too: end ids, stop strings, length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quasar.text import TextStream

STOP, LENGTH, CANCELLED, DEADLINE = "stop", "length", "cancelled", "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Why the answer ends after a token, if it does.

    `stopped_by`: the stop id or the stop string; None where it ends because nothing can follow.
    """

    finish_reason: str | None = None
    stopped_by: int | str | None = None


_GOES_ON = Cut()


class StopRules:
    """Ends an answer after a stop id, before a stop string, when it is complete, or at `max_new_tokens`.

    Keeps the text while it grows.

    Args:
        stop_tokens: stop ids that were asked for by their spelling, id → spelling; `stopped_by` is the spelling then.
        stream: makes the text; None keeps none, and knows no stop strings.
        min_new_tokens: stop strings that are complete before are text like any other.
        is_complete: asked after each token: whether nothing can follow it.
    """

    def __init__(
        self,
        *,
        max_new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        stop_strings: Sequence[str] = (),
        min_new_tokens: int = 0,
        stop_tokens: Mapping[int, str] | None = None,
        stream: TextStream | None = None,
        is_complete: Callable[[], bool] = lambda: False,
    ) -> None:
        self._max, self._min, self._stop_ids, self._strings = max_new_tokens, min_new_tokens, stop_ids, stop_strings
        self._stop_tokens = stop_tokens or {}
        self._stream, self._is_complete = stream, is_complete
        self._longest = max((len(one) for one in stop_strings), default=0)
        self._count = 0
        self._text = ""
        self._given = 0
        self._ended = False

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self._max - self._count

    def limit(self, tokens: int) -> None:
        """Allow no more than `tokens` in all: what the KV cache has room for."""
        self._max = min(self._max, tokens)

    def take(self, token: int) -> Cut:
        """Another token of the answer; nothing may be taken after one that ends it."""
        self._count += 1
        stopped_by: int | str | None = self._push(token)
        if token in self._stop_ids:
            if stopped_by is None:
                self._finish()
            stopped_by = self._stop_tokens.get(token, token)
        if stopped_by is not None:
            self._ended = True
            return Cut(finish_reason=STOP, stopped_by=stopped_by)
        if self._is_complete():
            self._finish()
            return Cut(finish_reason=STOP)
        if self._count == self._max:
            self._finish()
            return Cut(finish_reason=LENGTH)
        return _GOES_ON

    def end(self) -> None:
        """No more tokens come."""
        self._finish()

    def take_text(self) -> str:
        """The text since the last call; what may be the start of a stop string waits for more."""
        end = len(self._text)
        if not self._ended:
            end -= self._withheld()
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _push(self, token: int) -> str | None:
        """The stop string that this token completes; the text is cut before it."""
        if self._stream is None:
            return None
        before = len(self._text)
        self._text += self._stream.push([token])
        return self._find(before) if self._count >= self._min else None

    def _find(self, before: int) -> str | None:
        """The first stop string that ends after `before`."""
        start = max(self._given, before - self._longest + 1)
        found = []
        for order, string in enumerate(self._strings):
            place = self._text.find(string, max(start, before - len(string) + 1))
            if place >= 0:
                found.append((place, order))
        if not found:
            return None
        place, order = min(found)
        self._text = self._text[:place]
        return self._strings[order]

    def _finish(self) -> None:
        if self._stream is not None and not self._ended:
            before = len(self._text)
            self._text += self._stream.finish()
            if self._count >= self._min:
                self._find(before)
        self._ended = True

    def _withheld(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(self._text) - self._given), 0, -1):
            if any(one.startswith(self._text[-length:]) for one in self._strings):
                return length
        return 0
