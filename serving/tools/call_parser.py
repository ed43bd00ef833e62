"""Calls in the text of an answer, read while it comes: the pieces are the same however the text is cut."""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from serving.tools.call_formats import CallFormat
from serving.tools.object_scanner import ObjectScanner


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """How the calls of one answer are read.

    `names`: of the functions; what names another is text. `certain`: a grammar makes the calls, so that their arguments
    are given as they come. Else a call is given when it is whole, since one that is malformed stays text.
    """

    format: CallFormat
    names: frozenset[str]
    certain: bool = False


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """A piece of a call: the function's name to begin with, then JSON text of the arguments.

    `index`: which call of the answer it is.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call; `arguments`: JSON text, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAnswer:
    """An answer's text, and its calls. `whole`: no call was cut."""

    text: str
    calls: tuple[Call, ...]
    whole: bool


class CallParser:
    """Reads one answer. What may be the beginning of a call is withheld, and the spaces before calls are left out."""

    def __init__(self, rules: CallRules) -> None:
        self._rules, self._format = rules, rules.format
        self._buffer = ""
        # Calls may begin here, where they have no opener.
        self._at_start = True
        # The call that is read, and the text before its object, which is shown if it is none.
        self._scanner: ObjectScanner | None = None
        self._before = ""
        # Characters of the arguments that were given; None: the call has not been told yet.
        self._given: int | None = None
        # A call has just ended, and its closer may follow.
        self._after_call = False
        self._shown = False
        # Calls so far, and whether all of them are whole.
        self.calls = 0
        self.whole = True

    def push(self, text: str) -> list[TextPiece | CallPiece]:
        """What the next text completes."""
        self._buffer += text
        return list(self._pieces(final=False))

    def finish(self) -> list[TextPiece | CallPiece]:
        """What is left when nothing more comes."""
        return list(self._pieces(final=True))

    def _pieces(self, *, final: bool) -> Iterator[TextPiece | CallPiece]:
        while True:
            if self._scanner is not None:
                moved = yield from self._object(self._scanner, final=final)
            elif self._after_call:
                moved = self._closer(final=final)
            else:
                moved = yield from self._text(final=final)
            if not moved:
                return

    def _text(self, *, final: bool) -> Generator[TextPiece, None, bool]:
        """Text up to the next call; True if one may begin there."""
        shown, begin = self._find_anywhere() if self._format.opener else self._find_at_start()
        if final and begin is None:
            # No call comes any more. After calls the last spaces were before another one, as often as not.
            shown = len(self._buffer.rstrip() if self.calls else self._buffer)
        yield from self._show(self._buffer[:shown])
        if begin is None:
            self._buffer = self._buffer[shown:]
            return False
        self._before, self._buffer = self._buffer[shown:begin], self._buffer[begin:]
        self._scanner, self._given = ObjectScanner(), None
        return True

    def _show(self, text: str) -> Iterator[TextPiece]:
        """Text, without the spaces between a call and the first text."""
        text = text if self._shown or not self.calls else text.lstrip()
        if text:
            self._shown = True
            yield TextPiece(text)

    def _find_anywhere(self) -> tuple[int, int | None]:
        """(characters that are text for certain, where a call's object may begin)."""
        buffer, opener = self._buffer, self._format.opener
        place = buffer.find(opener)
        if place >= 0:
            return len(buffer[:place].rstrip()), place + len(opener)
        return len(buffer[: len(buffer) - _overlap(buffer, opener)].rstrip()), None

    def _find_at_start(self) -> tuple[int, int | None]:
        """The same, where calls have no opener."""
        buffer, tag = self._buffer, self._format.tag
        if self._at_start:
            rest = buffer.lstrip()
            if rest.startswith(tag):
                rest = rest[len(tag) :].lstrip()
            elif tag.startswith(rest):
                return 0, None
            if rest.startswith("{"):
                return 0, len(buffer) - len(rest)
            if not rest:
                return 0, None
            self._at_start = False
        return len(buffer), None

    def _object(self, scanner: ObjectScanner, *, final: bool) -> Generator[TextPiece | CallPiece, None, bool]:
        """What is known of a call; True if it is over."""
        scanner.read(self._buffer)
        over = scanner.complete or scanner.broken or final
        if self._is_call(scanner) and (scanner.complete or self._rules.certain):
            yield from self._told(scanner)
        if not over:
            return False
        if self._given is None:
            # No call: what looked like its beginning is text, and the rest is looked at again.
            yield from self._show(self._before)
            self._at_start = False
        else:
            self.calls += 1
            self.whole = self.whole and scanner.complete
            self._buffer = self._buffer[scanner.position :]
            self._after_call = True
        self._scanner = None
        return True

    def _is_call(self, scanner: ObjectScanner) -> bool:
        """Whether the function is one of those offered, and its arguments an object."""
        span, arguments = scanner.values.get("name"), self._arguments(scanner)
        if span is None or span[1] is None or arguments is None or self._buffer[arguments[0]] != "{":
            return False
        return self._name(span) in self._rules.names

    def _told(self, scanner: ObjectScanner) -> Iterator[CallPiece]:
        if self._given is None:
            self._given = 0
            yield CallPiece(index=self.calls, name=self._name(scanner.values["name"]))
        span = self._arguments(scanner)
        assert span is not None
        begin, end = span[0] + self._given, scanner.position if span[1] is None else span[1]
        if begin < end:
            self._given += end - begin
            yield CallPiece(index=self.calls, arguments=self._buffer[begin:end])

    def _name(self, span: tuple[int, int | None]) -> str:
        text = self._buffer[span[0] : span[1]]
        return str(json.loads(text)) if text.startswith('"') else ""

    def _arguments(self, scanner: ObjectScanner) -> tuple[int, int | None] | None:
        return next((scanner.values[key] for key in self._format.arguments if key in scanner.values), None)

    def _closer(self, *, final: bool) -> bool:
        """Leave out what ends a call; False while it may still come."""
        closer, rest = self._format.closer, self._buffer.lstrip()
        if rest.startswith(closer):
            # The next call may follow at once.
            self._buffer, self._at_start = rest[len(closer) :], True
        elif closer.startswith(rest):
            self._buffer = "" if final else self._buffer
            return False
        else:
            self._at_start = False
        self._after_call = False
        return True


def parse_answer(text: str, rules: CallRules) -> ParsedAnswer:
    """The calls of an answer that is there as a whole."""
    parser = CallParser(rules)
    texts: list[str] = []
    calls: list[Call] = []
    for piece in [*parser.push(text), *parser.finish()]:
        if isinstance(piece, TextPiece):
            texts.append(piece.text)
        elif piece.name is not None:
            calls.append(Call(name=piece.name, arguments=piece.arguments))
        else:
            calls[-1] = Call(name=calls[-1].name, arguments=calls[-1].arguments + piece.arguments)
    return ParsedAnswer(text="".join(texts), calls=tuple(calls), whole=parser.whole)


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters may be the beginning of the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
