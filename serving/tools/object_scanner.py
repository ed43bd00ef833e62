"""Reads a JSON object character by character: how far it is whole, and where the values of its own keys stand."""

import json

_SPACE = " \t\n\r"
_DIGITS = "0123456789"
_ESCAPES = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
# Where a number stands → characters → where it stands after one of them.
_NUMBER: dict[str, tuple[tuple[str, str], ...]] = {
    "minus": (("0", "zero"), ("123456789", "whole")),
    "zero": ((".", "point"), ("eE", "exponent")),
    "whole": ((_DIGITS, "whole"), (".", "point"), ("eE", "exponent")),
    "point": ((_DIGITS, "fraction"),),
    "fraction": ((_DIGITS, "fraction"), ("eE", "exponent")),
    "exponent": (("+-", "sign"), (_DIGITS, "power")),
    "sign": ((_DIGITS, "power"),),
    "power": ((_DIGITS, "power"),),
}
_NUMBER_ENDS = ("zero", "whole", "fraction", "power")


class ObjectScanner:
    """Reads one object of a text that grows; spaces may stand before it.

    Attributes:
        position: characters that were read; where the text stops to be JSON, or the end of the object.
        complete: the object is whole.
        broken: the next character cannot stand there.
        values: key of the object → where its first value begins and, once it is whole, ends.
    """

    def __init__(self) -> None:
        self.position = 0
        self.complete = self.broken = False
        self.values: dict[str, tuple[int, int | None]] = {}
        self._state = "object"
        self._open: list[str] = []
        # The rest of a literal, or of the digits of an escape.
        self._rest = ""
        self._number = ""
        # The string that is read is a key; where it, or the value of a key of the object's own, begins; that key.
        self._is_key = False
        self._start = 0
        self._key = ""

    def read(self, text: str) -> None:
        """Read on; `text` is the whole text so far."""
        while self.position < len(text) and not (self.complete or self.broken):
            if not self._take(text[self.position], text):
                self.broken = True
                return
            self.position += 1

    def _take(self, character: str, text: str) -> bool:
        """Read one character; False if it cannot stand there."""
        state = self._state
        if state == "string":
            return self._in_string(character, text)
        if state == "escape":
            if character == "u":
                self._state, self._rest = "hex", "0000"
                return True
            self._state = "string"
            return character in _ESCAPES
        if state == "hex":
            self._rest = self._rest[1:]
            self._state = "hex" if self._rest else "string"
            return character in _HEX
        if state == "literal":
            fits, self._rest = character == self._rest[0], self._rest[1:]
            if not self._rest:
                self._ended(self.position + 1)
            return fits
        if state == "number":
            return self._in_number(character, text)
        return character in _SPACE or self._between(character)

    def _in_string(self, character: str, text: str) -> bool:
        if character == "\\":
            self._state = "escape"
        elif character == '"' and not self._is_key:
            self._ended(self.position + 1)
        elif character == '"':
            if len(self._open) == 1:
                self._key = json.loads(text[self._start : self.position + 1])
            self._state = "colon"
        return character >= " "

    def _in_number(self, character: str, text: str) -> bool:
        for characters, following in _NUMBER[self._number]:
            if character in characters:
                self._number = following
                return True
        if self._number not in _NUMBER_ENDS:
            return False
        self._ended(self.position)
        return self._take(character, text)

    def _between(self, character: str) -> bool:
        """Between keys and values."""
        state = self._state
        if state == "object":
            self._opened(character)
            return character == "{"
        if state == "colon":
            self._state = "value"
            return character == ":"
        if state == "next":
            if character == ",":
                self._state = "key" if self._open[-1] == "{" else "value"
                return True
            return self._closed(character)
        if state in ("key", "first key"):
            if character == '"':
                self._state, self._is_key = "string", True
                if len(self._open) == 1:
                    self._start = self.position
                return True
            return state == "first key" and self._closed(character)
        if state == "first value" and character == "]":
            return self._closed(character)
        return self._value(character)

    def _value(self, character: str) -> bool:
        if len(self._open) == 1:
            self.values.setdefault(self._key, (self.position, None))
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in ("{", "["):
            self._opened(character)
        elif character in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[character]
        elif character == "-" or character in _DIGITS:
            self._state = "number"
            self._number = "minus" if character == "-" else "zero" if character == "0" else "whole"
        else:
            return False
        return True

    def _opened(self, character: str) -> None:
        self._open.append(character)
        self._state = "first key" if character == "{" else "first value"

    def _closed(self, character: str) -> bool:
        if character != ("}" if self._open[-1] == "{" else "]"):
            return False
        self._open.pop()
        if self._open:
            self._ended(self.position + 1)
        else:
            self.complete = True
        return True

    def _ended(self, end: int) -> None:
        """A value is whole."""
        self._state = "next"
        if len(self._open) == 1 and self.values[self._key][1] is None:
            self.values[self._key] = (self.values[self._key][0], end)
